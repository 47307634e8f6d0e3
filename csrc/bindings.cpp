// The one file that includes pybind11. Raw pointers (as integers), sizes and the CUDA stream come in; every check of
// shape and dtype has been made in Python. Kernels live in files of their own, without pybind11 or torch headers.
#include <pybind11/pybind11.h>

#include <cstdint>

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
}
