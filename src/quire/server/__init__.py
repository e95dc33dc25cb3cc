"""The OpenAI-compatible server: doors over one engine, in one process. It is an extra (`pip install 'quire[server]'`).

`life.serve` runs it; `app.create_app` makes the application out of a `serving.Serving`, the one object that all doors share.
"""
