// The one file that includes pybind11. Raw pointers (as integers), sizes and the CUDA stream come in; every check of
// shape and dtype has been made in Python. Kernels live in files of their own, without pybind11 or torch headers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>

#include "byte_offset.hpp"
#include "density_map.hpp"
#include "dual_space.hpp"
#include "extract_shoeboxes.hpp"
#include "fourier.hpp"
#include "intensity_posterior.hpp"
#include "isa.hpp"
#include "mark_overlaps.hpp"
#include "patterson_map.hpp"
#include "poisson_gamma_elbo.hpp"
#include "profile_fit.hpp"
#include "spot_voxels.hpp"
#include "standard_gamma.hpp"
#include "structure_factors.hpp"
#include "tight_cell.hpp"

namespace py = pybind11;

namespace {

template <class T> T *pointer(std::uintptr_t address) { return reinterpret_cast<T *>(address); }

// The arguments that density_map and its backward share, by name.
xtalfast::AtomMaps atom_maps(const py::dict &d) {
  const auto address = [&](const char *name) { return d[name].cast<std::uintptr_t>(); };
  return {pointer<void>(address("coords")),
          pointer<std::int64_t>(address("element")),
          pointer<void>(address("b_iso")),
          pointer<void>(address("occupancy")),
          pointer<double>(address("form_factors")),
          pointer<std::int64_t>(address("ptr")),
          pointer<double>(address("cells")),
          pointer<std::int64_t>(address("grid")),
          pointer<std::int64_t>(address("offset")),
          d["n_maps"].cast<std::int64_t>(),
          d["n_atoms"].cast<std::int64_t>(),
          d["cutoff"].cast<double>(),
          d["blur"].cast<double>(),
          d["wide"].cast<bool>()};
}

// The shoeboxes of the intensity kernels, by name.
xtalfast::Shoeboxes shoeboxes(const py::dict &d) {
  const auto address = [&](const char *name) { return d[name].cast<std::uintptr_t>(); };
  return {pointer<void>(address("counts")),      static_cast<xtalfast::CountType>(d["count_type"].cast<int>()),
          pointer<void>(address("mask")),        static_cast<xtalfast::MaskType>(d["mask_type"].cast<int>()),
          pointer<std::int64_t>(address("ptr")), d["n"].cast<std::int64_t>(),
          d["pixels"].cast<std::int64_t>(),      pointer<void>(address("background")),
          d["background_rows"].cast<bool>(),     d["threads"].cast<int>()};
}

// The arguments that filter_spectrum and spectrum_intensity share, by name.
xtalfast::HalfSpectra half_spectra(const py::dict &d) {
  const auto n = d["n"].cast<std::array<std::int64_t, 3>>();
  return {pointer<double>(d["cells"].cast<std::uintptr_t>()),
          d["n_maps"].cast<std::int64_t>(),
          {n[0], n[1]},
          n[2] / 2 + 1,
          d["inverse_d2_max"].cast<double>(),
          d["scale"].cast<double>(),
          d["volume_power"].cast<int>(),
          d["f000"].cast<bool>(),
          d["wide"].cast<bool>()};
}

// What the spot model knows of the boxes, of the Gaussians and of the densities, by name.
xtalfast::SpotBoxes spot_boxes(const py::dict &d) {
  const auto address = [&](const char *name) { return d[name].cast<std::uintptr_t>(); };
  const auto size = [&](const char *name) { return d[name].cast<std::int64_t>(); };
  return {size("n"),
          size("n_z"),
          size("n_y"),
          size("n_x"),
          pointer<std::int32_t>(address("bbox")),
          pointer<double>(address("shift")),
          pointer<double>(address("panels")),
          pointer<std::int32_t>(address("panel")),
          pointer<double>(address("axes"))};
}

xtalfast::WhitenedSpots whitened_spots(const py::dict &d) {
  const auto address = [&](const char *name) { return d[name].cast<std::uintptr_t>(); };
  return {pointer<float>(address("inverse")), pointer<float>(address("centre")), pointer<float>(address("steps")),
          d["n_sub"].cast<std::int64_t>(), pointer<float>(address("scale"))};
}

xtalfast::SpotDensity spot_density(const py::dict &d) {
  const auto address = [&](const char *name) { return d[name].cast<std::uintptr_t>(); };
  const auto size = [&](const char *name) { return d[name].cast<std::int64_t>(); };
  return {pointer<float>(address("density")),
          pointer<float>(address("cell")),
          pointer<float>(address("images")),
          size("cells"),
          size("n_k"),
          size("nodes"),
          d["extent"].cast<float>()};
}

} // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("version") = XTALFAST_VERSION;
#ifdef XTALFAST_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif

  m.def("isa", [] { return xtalfast::isa_name(xtalfast::chosen_isa()); }); // that kernels compiled for several use

  // -> (status, pixels decoded, bytes used); see ByteOffsetStatus.
  m.def("byte_offset_decode", [](std::uintptr_t data, std::size_t size, std::uintptr_t out, std::size_t n, int isa) {
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

  // `stream` is used on a CUDA device only; -> 0 or a cudaError_t.
  m.def(
      "extract_shoeboxes",
      [](std::uintptr_t pixels, bool wide_pixels, std::uintptr_t mask, std::int64_t mask_stride, std::int64_t n_z,
         std::int64_t n_y, std::int64_t n_x, std::int32_t low, std::int32_t high, std::uintptr_t bbox,
         std::uintptr_t offset, std::int64_t n, std::uintptr_t counts, bool wide_counts, std::uintptr_t valid,
         std::uintptr_t peak, std::uintptr_t overloads, bool on_cuda, std::uintptr_t stream, int n_threads) {
        const xtalfast::ImageStack images{
            pointer<void>(pixels), pointer<std::uint8_t>(mask), mask_stride, n_z, n_y, n_x, low, high, wide_pixels};
        const xtalfast::Boxes boxes{pointer<std::int32_t>(bbox),
                                    pointer<std::int64_t>(offset),
                                    n,
                                    pointer<void>(counts),
                                    pointer<std::uint8_t>(valid),
                                    pointer<std::int32_t>(peak),
                                    pointer<std::int32_t>(overloads),
                                    wide_counts};
        if (!on_cuda) {
          xtalfast::extract_shoeboxes(images, boxes, n_threads);
          return 0;
        }
#ifdef XTALFAST_WITH_CUDA
        return xtalfast::extract_shoeboxes_cuda(images, boxes, pointer<void>(stream));
#else
        (void)stream;
        return -1;
#endif
      },
      py::arg("pixels"), py::arg("wide_pixels"), py::arg("mask"), py::arg("mask_stride"), py::arg("n_z"),
      py::arg("n_y"), py::arg("n_x"), py::arg("low"), py::arg("high"), py::arg("bbox"), py::arg("offset"), py::arg("n"),
      py::arg("counts"), py::arg("wide_counts"), py::arg("valid"), py::arg("peak"), py::arg("overloads"),
      py::arg("on_cuda"), py::arg("stream"), py::arg("n_threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "mark_overlaps",
      [](std::uintptr_t bbox, std::uintptr_t offset, std::uintptr_t hkl, std::uintptr_t centre, std::uintptr_t shift,
         std::int64_t n, std::uintptr_t mask, std::uintptr_t index_from_lab, std::int64_t z_begin, std::int64_t n_z,
         std::uintptr_t panel, std::uintptr_t s0, double wavelength, std::uintptr_t rotation,
         std::uintptr_t translation, std::int64_t n_ops, std::int32_t denominator, std::uint8_t bit, int n_threads) {
        const xtalfast::OverlapBoxes boxes{pointer<std::int32_t>(bbox), pointer<std::int64_t>(offset),
                                           pointer<std::int32_t>(hkl),  pointer<double>(centre),
                                           pointer<double>(shift),      n,
                                           pointer<std::uint8_t>(mask)};
        const xtalfast::OverlapGeometry geometry{
            pointer<double>(index_from_lab), z_begin, n_z, pointer<double>(panel), pointer<double>(s0), wavelength};
        const xtalfast::Absences absences{pointer<std::int32_t>(rotation), pointer<std::int32_t>(translation), n_ops,
                                          denominator};
        xtalfast::mark_overlaps(boxes, geometry, absences, bit, n_threads);
      },
      py::arg("bbox"), py::arg("offset"), py::arg("hkl"), py::arg("centre"), py::arg("shift"), py::arg("n"),
      py::arg("mask"), py::arg("index_from_lab"), py::arg("z_begin"), py::arg("n_z"), py::arg("panel"), py::arg("s0"),
      py::arg("wavelength"), py::arg("rotation"), py::arg("translation"), py::arg("n_ops"), py::arg("denominator"),
      py::arg("bit"), py::arg("n_threads"), py::call_guard<py::gil_scoped_release>());

  m.def("spot_directions", [](const py::dict &boxes, std::uintptr_t epsilon, int n_threads) {
    const xtalfast::SpotBoxes b = spot_boxes(boxes);
    const py::gil_scoped_release release;
    xtalfast::spot_directions(b, pointer<float>(epsilon), n_threads);
  });
  m.def("spot_foreground",
        [](const py::dict &boxes, double scale, std::uintptr_t rotation, std::uintptr_t inside, int n_threads) {
          const xtalfast::SpotBoxes b = spot_boxes(boxes);
          const py::gil_scoped_release release;
          xtalfast::spot_foreground(b, scale, pointer<float>(rotation), pointer<std::uint8_t>(inside), n_threads);
        });
  m.def("gaussian_voxels", [](const py::dict &boxes, const py::dict &spots, std::uintptr_t share, int n_threads) {
    const xtalfast::SpotBoxes b = spot_boxes(boxes);
    const xtalfast::WhitenedSpots s = whitened_spots(spots);
    const py::gil_scoped_release release;
    xtalfast::gaussian_voxels(b, s, pointer<float>(share), n_threads);
  });
  m.def("density_voxels",
        [](const py::dict &boxes, const py::dict &spots, const py::dict &density, std::uintptr_t share, int n_threads) {
          const xtalfast::SpotBoxes b = spot_boxes(boxes);
          const xtalfast::WhitenedSpots s = whitened_spots(spots);
          const xtalfast::SpotDensity d = spot_density(density);
          const py::gil_scoped_release release;
          xtalfast::density_voxels(b, s, d, pointer<float>(share), n_threads);
        });
  m.def("density_voxels_backward",
        [](const py::dict &boxes, const py::dict &spots, const py::dict &density, std::uintptr_t factor_0,
           std::uintptr_t factor_1, std::uintptr_t sum_0, std::uintptr_t sum_1, int n_threads) {
          const xtalfast::SpotBoxes b = spot_boxes(boxes);
          const xtalfast::WhitenedSpots s = whitened_spots(spots);
          const xtalfast::SpotDensity d = spot_density(density);
          const float *const factors[2] = {pointer<float>(factor_0), pointer<float>(factor_1)};
          double *const sums[2] = {pointer<double>(sum_0), pointer<double>(sum_1)};
          const py::gil_scoped_release release;
          xtalfast::density_voxels_backward(b, s, d, factors, sums, n_threads);
        });
  m.def(
      "impose_on_pairs",
      [](std::uintptr_t values, std::uintptr_t target, std::int64_t n_pairs, const std::array<std::int64_t, 3> &n,
         int n_threads) {
        xtalfast::impose_on_pairs({pointer<float>(values), pointer<float>(target), n_pairs, {n[0], n[1], n[2]}},
                                  n_threads);
      },
      py::arg("values"), py::arg("target"), py::arg("n_pairs"), py::arg("n"), py::arg("n_threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "hio_update",
      [](std::uintptr_t maps, std::uintptr_t projected, std::uintptr_t protein, float beta, std::int64_t n,
         int n_threads) {
        xtalfast::hio_update(pointer<float>(maps), pointer<float>(projected), pointer<std::uint8_t>(protein), beta, n,
                             n_threads);
      },
      py::arg("maps"), py::arg("projected"), py::arg("protein"), py::arg("beta"), py::arg("n"), py::arg("n_threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "flatten_pairs",
      [](std::uintptr_t maps, std::uintptr_t protein, float flip, std::int64_t n, int n_threads) {
        xtalfast::flatten_pairs(pointer<float>(maps), pointer<std::uint8_t>(protein), flip, n, n_threads);
      },
      py::arg("maps"), py::arg("protein"), py::arg("flip"), py::arg("n"), py::arg("n_threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "square_positive",
      [](std::uintptr_t in, std::uintptr_t out, std::int64_t n, int n_threads) {
        xtalfast::square_positive(pointer<float>(in), pointer<float>(out), n, n_threads);
      },
      py::arg("input"), py::arg("out"), py::arg("n"), py::arg("n_threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "threshold_pairs",
      [](std::uintptr_t density, std::uintptr_t solvent, std::uintptr_t protein, std::int64_t n_pairs,
         std::int64_t n_voxels, std::int64_t step, int n_threads) {
        xtalfast::threshold_pairs(pointer<float>(density), pointer<float>(solvent), pointer<std::uint8_t>(protein),
                                  n_pairs, n_voxels, step, n_threads);
      },
      py::arg("density"), py::arg("solvent"), py::arg("protein"), py::arg("n_pairs"), py::arg("n_voxels"),
      py::arg("step"), py::arg("n_threads"), py::call_guard<py::gil_scoped_release>());

  m.def("find_impossible_cell", [](std::uintptr_t cells, std::int64_t n) {
    return xtalfast::find_impossible_cell(pointer<const double>(cells), n);
  });

  // The functions on a CUDA device -> 0 or a cudaError_t.
  m.def(
      "density_map",
      [](const py::dict &maps, std::uintptr_t density, int n_threads) {
        const xtalfast::AtomMaps atoms = atom_maps(maps);
        const py::gil_scoped_release release;
        xtalfast::density_map(atoms, pointer<void>(density), n_threads);
      },
      py::arg("maps"), py::arg("density"), py::arg("n_threads"));
#ifdef XTALFAST_WITH_CUDA
  m.attr("density_brick") = xtalfast::density_brick;
  m.def("density_map_workspace", [](const py::dict &maps) { return xtalfast::density_map_workspace(atom_maps(maps)); });
  m.def(
      "density_map_cuda",
      [](const py::dict &maps, std::uintptr_t brick_ptr, std::int64_t n_bricks, std::uintptr_t workspace,
         std::uintptr_t density, std::uintptr_t stream) {
        const xtalfast::DensityBricks bricks{pointer<std::int64_t>(brick_ptr), n_bricks, pointer<void>(workspace)};
        return xtalfast::density_map_cuda(atom_maps(maps), bricks, pointer<void>(density), pointer<void>(stream));
      },
      py::arg("maps"), py::arg("brick_ptr"), py::arg("n_bricks"), py::arg("workspace"), py::arg("density"),
      py::arg("stream"));
#endif
  m.def(
      "density_map_backward",
      [](const py::dict &maps, std::uintptr_t grad, std::uintptr_t coords, std::uintptr_t b_iso,
         std::uintptr_t occupancy, bool on_cuda, std::uintptr_t stream, int n_threads) {
        const xtalfast::AtomMaps atoms = atom_maps(maps);
        const xtalfast::AtomGradients out{pointer<void>(grad), pointer<void>(coords), pointer<void>(b_iso),
                                          pointer<void>(occupancy)};
        const py::gil_scoped_release release;
        if (!on_cuda) {
          xtalfast::density_map_backward(atoms, out, n_threads);
          return 0;
        }
#ifdef XTALFAST_WITH_CUDA
        return xtalfast::density_map_backward_cuda(atoms, out, pointer<void>(stream));
#else
        (void)stream;
        return -1;
#endif
      },
      py::arg("maps"), py::arg("grad"), py::arg("coords"), py::arg("b_iso"), py::arg("occupancy"), py::arg("on_cuda"),
      py::arg("stream"), py::arg("n_threads"));

  m.def(
      "standard_gamma",
      [](std::uintptr_t shape, std::int64_t streams, std::int64_t rows, std::int64_t samples, std::int64_t first,
         std::int64_t seed, std::uintptr_t draws, int n_threads) {
        xtalfast::standard_gamma({pointer<double>(shape), streams, rows, samples, first,
                                  static_cast<std::uint64_t>(seed), pointer<double>(draws), n_threads});
      },
      py::arg("shape"), py::arg("streams"), py::arg("rows"), py::arg("samples"), py::arg("first"), py::arg("seed"),
      py::arg("draws"), py::arg("n_threads"), py::call_guard<py::gil_scoped_release>());
  // Rows of the table [rows, n] from numbers and from tensors [n] or [1], given as (address, is double, stride).
  m.def("gamma_table", [](const py::list &values, std::int64_t n, std::uintptr_t table) {
    double *to = pointer<double>(table);
    for (const py::handle value : values) {
      if (py::isinstance<py::tuple>(value)) {
        const auto [address, wide, stride] = value.cast<std::tuple<std::uintptr_t, bool, std::int64_t>>();
        for (std::int64_t i = 0; i < n; ++i)
          to[i] = wide ? pointer<double>(address)[i * stride] : pointer<float>(address)[i * stride];
      } else {
        std::fill_n(to, n, value.cast<double>());
      }
      to += n;
    }
  });
  m.def("poisson_gamma_elbo", [](const py::dict &boxes, const py::dict &d) {
    const auto address = [&](const char *name) { return d[name].cast<std::uintptr_t>(); };
    const xtalfast::ElboArguments arguments{shoeboxes(boxes),
                                            boxes["wide"].cast<bool>(),
                                            d["gradients"].cast<bool>(),
                                            static_cast<xtalfast::ProfileKind>(d["profile_kind"].cast<int>()),
                                            pointer<void>(address("profile")),
                                            pointer<void>(address("mean")),
                                            pointer<void>(address("scale_tril")),
                                            pointer<void>(address("grid")),
                                            pointer<double>(address("gammas")),
                                            d["nodes"].cast<int>(),
                                            d["samples"].cast<int>(),
                                            pointer<double>(address("draws")),
                                            pointer<double>(address("slopes")),
                                            pointer<double>(address("loss")),
                                            pointer<void>(address("grad_profile")),
                                            pointer<void>(address("grad_mean")),
                                            pointer<void>(address("grad_scale")),
                                            pointer<double>(address("grad_gammas"))};
    const py::gil_scoped_release release;
    xtalfast::poisson_gamma_elbo(arguments);
  });

  m.def(
      "filter_spectrum",
      [](const py::dict &spectra, double blur, std::uintptr_t in, std::uintptr_t out, bool on_cuda,
         std::uintptr_t stream, int n_threads) {
        const xtalfast::HalfSpectra s = half_spectra(spectra);
        const py::gil_scoped_release release;
        if (!on_cuda) {
          xtalfast::filter_spectrum(s, blur, pointer<void>(in), pointer<void>(out), n_threads);
          return 0;
        }
#ifdef XTALFAST_WITH_CUDA
        return xtalfast::filter_spectrum_cuda(s, blur, pointer<void>(in), pointer<void>(out), pointer<void>(stream));
#else
        (void)stream;
        return -1;
#endif
      },
      py::arg("spectra"), py::arg("blur"), py::arg("input"), py::arg("out"), py::arg("on_cuda"), py::arg("stream"),
      py::arg("n_threads"));
  m.def(
      "spectrum_intensity",
      [](const py::dict &spectra, std::uintptr_t in, std::uintptr_t intensity, std::int64_t n_kept, bool on_cuda,
         std::uintptr_t stream, int n_threads) {
        const xtalfast::HalfSpectra s = half_spectra(spectra);
        const py::gil_scoped_release release;
        if (!on_cuda) {
          xtalfast::spectrum_intensity(s, pointer<void>(in), pointer<void>(intensity), n_kept, n_threads);
          return 0;
        }
#ifdef XTALFAST_WITH_CUDA
        return xtalfast::spectrum_intensity_cuda(s, pointer<void>(in), pointer<void>(intensity), n_kept,
                                                 pointer<void>(stream));
#else
        (void)stream;
        return -1;
#endif
      },
      py::arg("spectra"), py::arg("input"), py::arg("intensity"), py::arg("n_kept"), py::arg("on_cuda"),
      py::arg("stream"), py::arg("n_threads"));
  m.def(
      "mirror_map",
      [](std::int64_t n_maps, const std::array<std::int64_t, 3> &n, bool wide, std::uintptr_t half, std::uintptr_t map,
         bool on_cuda, std::uintptr_t stream, int n_threads) {
        const xtalfast::HalfMaps maps{n_maps, {n[0], n[1], n[2]}, wide};
        const py::gil_scoped_release release;
        if (!on_cuda) {
          xtalfast::mirror_map(maps, pointer<void>(half), pointer<void>(map), n_threads);
          return 0;
        }
#ifdef XTALFAST_WITH_CUDA
        return xtalfast::mirror_map_cuda(maps, pointer<void>(half), pointer<void>(map), pointer<void>(stream));
#else
        (void)stream;
        return -1;
#endif
      },
      py::arg("n_maps"), py::arg("n"), py::arg("wide"), py::arg("half"), py::arg("map"), py::arg("on_cuda"),
      py::arg("stream"), py::arg("n_threads"));
  m.def("has_contact", [](std::uintptr_t coords, std::int64_t n, std::uintptr_t orth, double distance) {
    return xtalfast::has_contact({pointer<double>(coords), n}, pointer<double>(orth), distance);
  });
  m.def("tight_cell_growth", [](std::uintptr_t coords, std::int64_t n, std::uintptr_t directions,
                                std::uintptr_t extents, double distance, double step, double most) {
    const py::gil_scoped_release release;
    return xtalfast::tight_cell_growth({pointer<double>(coords), n}, pointer<double>(directions),
                                       pointer<double>(extents), distance, step, most);
  });
  m.def("can_transform", [](const std::array<std::int64_t, 3> &n) { return xtalfast::can_transform(n.data()); });
  m.def(
      "maps_to_spectra",
      [](const py::dict &spectra, std::int64_t n_z, double blur, std::uintptr_t in, std::uintptr_t out, int n_threads) {
        const xtalfast::HalfSpectra s = half_spectra(spectra);
        const py::gil_scoped_release release;
        xtalfast::maps_to_spectra(s, n_z, blur, pointer<void>(in), pointer<void>(out), n_threads);
      },
      py::arg("spectra"), py::arg("n_z"), py::arg("blur"), py::arg("input"), py::arg("out"), py::arg("n_threads"));
  m.def(
      "spectra_to_maps",
      [](const py::dict &spectra, std::int64_t n_z, std::uintptr_t in, std::uintptr_t out, int n_threads) {
        const xtalfast::HalfSpectra s = half_spectra(spectra);
        const py::gil_scoped_release release;
        xtalfast::spectra_to_maps(s, n_z, pointer<void>(in), pointer<void>(out), n_threads);
      },
      py::arg("spectra"), py::arg("n_z"), py::arg("input"), py::arg("out"), py::arg("n_threads"));
  m.def(
      "intensities_to_pattersons",
      [](std::int64_t n_maps, const std::array<std::int64_t, 3> &n, std::int64_t n_l, bool wide, std::uintptr_t in,
         std::uintptr_t out, int n_threads) {
        const xtalfast::Intensities s{n_maps, {n[0], n[1], n[2]}, n_l, wide};
        const py::gil_scoped_release release;
        xtalfast::intensities_to_pattersons(s, pointer<void>(in), pointer<void>(out), n_threads);
      },
      py::arg("n_maps"), py::arg("n"), py::arg("n_l"), py::arg("wide"), py::arg("input"), py::arg("out"),
      py::arg("n_threads"));
  m.def("profile_fit", [](const py::dict &boxes, const py::dict &d) {
    const auto address = [&](const char *name) { return d[name].cast<std::uintptr_t>(); };
    const xtalfast::ProfileFitArguments arguments{shoeboxes(boxes),
                                                  boxes["wide"].cast<bool>(),
                                                  pointer<void>(address("profile")),
                                                  pointer<double>(address("at")),
                                                  d["tolerance"].cast<double>(),
                                                  d["least_background"].cast<double>(),
                                                  pointer<double>(address("fit")),
                                                  pointer<std::int64_t>(address("iterations")),
                                                  pointer<std::uint8_t>(address("converged"))};
    const py::gil_scoped_release release;
    xtalfast::profile_fit(arguments);
  });
  m.def("intensity_posterior", [](const py::dict &boxes, const py::dict &d) {
    const auto address = [&](const char *name) { return d[name].cast<std::uintptr_t>(); };
    const xtalfast::PosteriorArguments arguments{shoeboxes(boxes),
                                                 boxes["wide"].cast<bool>(),
                                                 pointer<void>(address("profile")),
                                                 pointer<double>(address("prior")),
                                                 pointer<double>(address("node")),
                                                 d["nodes"].cast<int>(),
                                                 d["tolerance"].cast<double>(),
                                                 d["tail"].cast<double>(),
                                                 pointer<double>(address("summary")),
                                                 pointer<double>(address("log_rates"))};
    const py::gil_scoped_release release;
    xtalfast::intensity_posterior(arguments);
  });
}
