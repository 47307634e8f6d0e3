// The one file that includes pybind11. Raw pointers (as integers), sizes and the CUDA stream come in; every check of
// shape and dtype has been made in Python. Kernels live in files of their own, without pybind11 or torch headers.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "byte_offset.hpp"

namespace py = pybind11;

namespace {

template <class T>
T *pointer(std::uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("version") = XTALFAST_VERSION;
#ifdef XTALFAST_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif

  // -> (status, pixels decoded, bytes used); see ByteOffsetStatus.
  m.def("byte_offset_decode",
        [](std::uintptr_t data, std::size_t size, std::uintptr_t out, std::size_t n, int isa) {
          xtalfast::ByteOffsetResult r;
          {
            py::gil_scoped_release release;
            r = xtalfast::byte_offset_decode(pointer<const std::uint8_t>(data), size, pointer<std::int32_t>(out), n,
                                             static_cast<xtalfast::ByteOffsetIsa>(isa));
          }
          return py::make_tuple(static_cast<int>(r.status), r.pixels, r.bytes);
        });
  m.def("byte_offset_best_isa", [] { return static_cast<int>(xtalfast::byte_offset_best_isa()); });
  m.def("byte_offset_encoded_size", [](std::uintptr_t pixels, std::size_t n) {
    return xtalfast::byte_offset_encoded_size(pointer<const std::int32_t>(pixels), n);
  });
  m.def("byte_offset_encode", [](std::uintptr_t pixels, std::size_t n, std::uintptr_t out) {
    py::gil_scoped_release release;
    xtalfast::byte_offset_encode(pointer<const std::int32_t>(pixels), n, pointer<std::uint8_t>(out));
  });
}
