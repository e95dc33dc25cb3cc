// Text as it comes, each token shaded by how unlikely it was.
const DARKEST = 6; // nats of surprise

export function append(element, text, logprobs) {
  const { tokens, values } = logprobs;
  const own = tokens.length && tokens.join("") === text;
  if (own) tokens.forEach((token, i) => element.append(span(token, values[i])));
  else if (text) element.append(span(text, values.length ? Math.min(...values.filter((value) => value !== null)) : null)); // held back, or half a character
}

function span(text, logprob) {
  const token = document.createElement("span");
  token.className = "token";
  token.textContent = text;
  if (Number.isFinite(logprob)) {
    token.style.backgroundColor = `rgb(var(--shade), ${(0.42 * Math.min(1, -logprob / DARKEST)).toFixed(3)})`;
    token.title = `${(100 * Math.exp(logprob)).toPrecision(3)} %`;
  }
  return token;
}

// The logprobs of a chunk, of completions or of chat.
export function logprobsOf(choice) {
  const told = choice.logprobs;
  if (told?.content) return { tokens: told.content.map((one) => one.token), values: told.content.map((one) => one.logprob) };
  return { tokens: told?.tokens ?? [], values: told?.token_logprobs ?? [] };
}
