// Python bindings of layer programs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>
#include <string.h>

#include <vector>

#include "bind.h"
#include "forward.h"

namespace nb = nanobind;

namespace quire {
namespace {

template <class T>
std::vector<T> unpacked(const nb::bytes& packed, const char* what) {
  require(packed.size() % sizeof(T) == 0, what);
  std::vector<T> items(packed.size() / sizeof(T));
  if (!items.empty()) memcpy(items.data(), packed.c_str(), packed.size());
  return items;
}

using GivenPart = std::pair<const Program*, std::vector<Address>>;

}  // namespace

// Whoever makes a Forward keeps its layers and programs.
void bind_rows(nb::module_& m) {
  nb::class_<Program>(m, "Program")
      .def("__init__",
           [](Program* program, nb::bytes instructions, nb::bytes buffers, nb::bytes steps, int64_t scratch_floats, int64_t arena_bytes) {
             new (program) Program(unpacked<RowInstruction>(instructions, "instructions must be whole RowInstruction structs"),
                                   unpacked<BufferForm>(buffers, "buffers must be whole BufferForm structs"),
                                   unpacked<PlannedStep>(steps, "steps must be whole PlannedStep structs"), scratch_floats, arena_bytes);
           })
      .def(
          "run",
          [](const Program& program, int64_t first, int64_t end, int64_t num_rows, const std::vector<Address>& addresses, int32_t num_threads) {
            program.run(first, end, num_rows, program.bound(addresses, num_rows), num_threads);
          },
          nb::call_guard<nb::gil_scoped_release>());
  nb::class_<Layers>(m, "Layers")
      .def(nb::init<>())
      .def("add", &Layers::add, nb::keep_alive<1, 2>())
      .def("set_weights", &Layers::set_weights)
      .def("run", &Layers::run, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<Forward>(m, "Forward")
      .def("__init__",
           [](Forward* forward, Address weight, int32_t format, int64_t n, int64_t k, int32_t dtype, const std::optional<GivenPart>& scaled,
              std::vector<int64_t> table_row_bytes, std::vector<std::pair<const Layers*, std::vector<int64_t>>> stages, const GivenPart& tail) {
             require(format == kRowsNK || (format >= kPackedF32 && format < kNumWeightFormats), "an embedding's format is not known");
             std::vector<Stage> made;
             for (auto& [layers, inputs] : stages) made.push_back({layers, std::move(inputs)});
             const auto part = [](const GivenPart& given) { return Part(given.first, given.second); };
             new (forward) Forward({weight, format, n, k, dtype}, scaled ? std::optional(part(*scaled)) : std::nullopt, std::move(table_row_bytes),
                                   std::move(made), part(tail));
           })
      .def("run", &Forward::run, nb::call_guard<nb::gil_scoped_release>())
      .def("keep", &Forward::keep);
  m.attr("table_positions") = Tables::kPositions;
  m.attr("table_blocks") = Tables::kBlocks;
  nb::class_<AttendForm>(m, "AttendForm")
      .def("__init__", [](AttendForm* form, int32_t dtype, int32_t num_heads, int32_t window, int32_t chunk, float scale, float softcap) {
        require(is_dtype(dtype) && num_heads > 0 && window >= 0 && chunk >= 0 && softcap >= 0, "attention's dtype, heads or mask are out of range");
        new (form) AttendForm{dtype, num_heads, window, chunk, scale, softcap};
      });
  nb::class_<ConvolveForm>(m, "ConvolveForm")
      .def("__init__", [](ConvolveForm* form, int32_t dtype, int32_t width, int32_t weight, int32_t bias) {
        require(is_dtype(dtype) && width > 0 && width <= kMostTaps && weight >= 0 && bias >= -1, "a convolution's dtype, width or weights are out of range");
        new (form) ConvolveForm{dtype, width, weight, bias};
      });
  m.attr("most_taps") = kMostTaps;
}

}  // namespace quire
