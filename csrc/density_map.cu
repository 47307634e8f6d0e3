#include "density_map.hpp"

#include <cuda_runtime.h>

#include <type_traits>

namespace xtalfast {
namespace {

constexpr int threads = 128;
constexpr int brick =
    density_brick; // a block sums one cube of 8^3 voxels of one map, four voxels of a row of z a thread
constexpr int voxels_per_thread = brick * brick * brick / threads;

inline __device__ float power_of_2(float x) { return exp2f(x); }
inline __device__ double power_of_2(double x) { return exp2(x); }

// Index of the map that holds item i of a ragged batch.
inline __device__ std::int64_t map_of(const std::int64_t *ptr, std::int64_t n_maps, std::int64_t i) {
  std::int64_t low = 0, high = n_maps; // ptr[low] <= i < ptr[high]
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (ptr[middle] <= i ? low : high) = middle;
  }
  return low;
}

template <class T> struct PlacedAtom {
  AtomShape<T> shape;
  T rest[3];
  int base[3], first[3], last[3]; // grid points: below the atom, and the first and last that it reaches
};

template <class T>
inline __device__ void place_atom(const AtomMaps &maps, std::int64_t i, std::int64_t atom, const UnitCell &cell,
                                  const GridMetric<T> &m, bool with_occupancy, PlacedAtom<T> &out) {
  const T b_iso = static_cast<const T *>(maps.b_iso)[atom];
  const double b = static_cast<double>(b_iso) + maps.blur;
  out.shape = make_atom_shape<T>(maps.form_factors + 2 * n_terms * maps.row[atom], b, maps.cutoff);
  if (with_occupancy)
    for (int k = 0; k < n_terms; ++k)
      out.shape.weight[k] *= static_cast<const T *>(maps.occupancy)[atom];
  const T *xyz = static_cast<const T *>(maps.coords) + 3 * atom;
  const auto at = make_grid_position(xyz, cell, maps.grid + 3 * i);
  const T radius = sqrt(out.shape.r2_max);
  for (int axis = 0; axis < 3; ++axis) {
    out.base[axis] = static_cast<int>(at.base[axis]);
    out.rest[axis] = at.rest[axis];
    out.first[axis] = out.base[axis] + static_cast<int>(ceil(at.rest[axis] - radius * m.reach[axis]));
    out.last[axis] = out.base[axis] + static_cast<int>(floor(at.rest[axis] + radius * m.reach[axis]));
  }
}

// Smallest multiple s of n with last + s >= low.
inline __device__ int first_shift(int last, int low, int n) {
  const int distance = low - last;
  const int s = distance > 0 ? (distance + n - 1) / n : -((-distance) / n);
  return s * n;
}

template <class T> __global__ void __launch_bounds__(threads) place_atoms_kernel(AtomMaps maps, PlacedAtom<T> *atoms) {
  const std::int64_t atom = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (atom >= maps.n_atoms)
    return;
  const std::int64_t i = map_of(maps.ptr, maps.n_maps, atom);
  const UnitCell cell = make_unit_cell(maps.cells + 6 * i);
  const GridMetric<T> m = make_grid_metric<T>(cell, maps.grid + 3 * i);
  place_atom(maps, i, atom, cell, m, true, atoms[atom]);
}

// Every voxel is summed by one thread, over the atoms in order and all their periodic images that reach the brick: no
// atomics, the same bits each time, and each voxel is written once.
template <class T>
__global__ void __launch_bounds__(threads)
    density_map_kernel(AtomMaps maps, const PlacedAtom<T> *__restrict__ placed,
                       const std::int64_t *__restrict__ brick_ptr, T *__restrict__ density) {
  __shared__ GridMetric<T> m;
  __shared__ PlacedAtom<T> atoms[threads];
  __shared__ std::int64_t map;
  if (threadIdx.x == 0) {
    map = map_of(brick_ptr, maps.n_maps, blockIdx.x);
    m = make_grid_metric<T>(make_unit_cell(maps.cells + 6 * map), maps.grid + 3 * map);
  }
  __syncthreads();
  int corner[3]; // of the brick
  {
    std::int64_t index = blockIdx.x - brick_ptr[map];
    for (int axis = 2; axis >= 0; --axis) {
      const std::int64_t bricks = (m.n[axis] + brick - 1) / brick;
      corner[axis] = static_cast<int>(index % bricks) * brick;
      index /= bricks;
    }
  }
  const int x = corner[0] + threadIdx.x / 16, y = corner[1] + threadIdx.x / 2 % 8;
  const int z = corner[2] + threadIdx.x % 2 * voxels_per_thread;
  T sum[voxels_per_thread] = {};
  for (std::int64_t start = maps.ptr[map]; start < maps.ptr[map + 1]; start += threads) {
    const int count = static_cast<int>(min(static_cast<std::int64_t>(threads), maps.ptr[map + 1] - start));
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < count)
      atoms[threadIdx.x] = placed[start + threadIdx.x];
    __syncthreads();
    for (int a = 0; a < count; ++a) { // the same for all threads of the block
      const PlacedAtom<T> &atom = atoms[a];
      const int n_x = static_cast<int>(m.n[0]), n_y = static_cast<int>(m.n[1]), n_z = static_cast<int>(m.n[2]);
      for (int sx = first_shift(atom.last[0], corner[0], n_x); atom.first[0] + sx < corner[0] + brick; sx += n_x) {
        const T dx = static_cast<T>(x - sx - atom.base[0]) - atom.rest[0];
        const T r2_x = m.xx * dx * dx;
        for (int sy = first_shift(atom.last[1], corner[1], n_y); atom.first[1] + sy < corner[1] + brick; sy += n_y) {
          const T dy = static_cast<T>(y - sy - atom.base[1]) - atom.rest[1], eta = dy + m.yx * dx;
          const T r2_xy = r2_x + m.yy * eta * eta;
          for (int sz = first_shift(atom.last[2], corner[2], n_z); atom.first[2] + sz < corner[2] + brick; sz += n_z) {
            const T zeta = static_cast<T>(z - sz - atom.base[2]) - atom.rest[2] + m.zx * dx + m.zy * dy;
#pragma unroll
            for (int v = 0; v < voxels_per_thread; ++v) {
              const T r2 = r2_xy + m.zz * (zeta + v) * (zeta + v);
              if (r2 <= atom.shape.r2_max)
                for (int k = 0; k < n_terms; ++k)
                  sum[v] += atom.shape.weight[k] * power_of_2(-atom.shape.decay[k] * r2);
            }
          }
        }
      }
    }
  }
  if (x < m.n[0] && y < m.n[1]) {
    T *row = density + maps.offset[map] + (x * m.n[1] + y) * m.n[2];
    for (int v = 0; v < voxels_per_thread; ++v)
      if (z + v < m.n[2])
        row[z + v] = sum[v];
  }
}

// One block an atom: its threads share the rows of its bounding box, and a tree adds up their sums.
template <class T>
__global__ void __launch_bounds__(threads) density_map_backward_kernel(AtomMaps maps, AtomGradients out) {
  __shared__ GridMetric<T> m;
  __shared__ PlacedAtom<T> atom;
  __shared__ double change_constant[n_terms], change_linear[n_terms];
  __shared__ double sums[5][threads];
  __shared__ std::int64_t map;
  const std::int64_t index = blockIdx.x;
  if (threadIdx.x == 0) {
    map = map_of(maps.ptr, maps.n_maps, index);
    const UnitCell cell = make_unit_cell(maps.cells + 6 * map);
    m = make_grid_metric<T>(cell, maps.grid + 3 * map);
    place_atom(maps, map, index, cell, m, false, atom);
    const double b = static_cast<double>(static_cast<const T *>(maps.b_iso)[index]) + maps.blur;
    for (int k = 0; k < n_terms; ++k) {
      const double width = maps.form_factors[2 * n_terms * maps.row[index] + n_terms + k] + b;
      change_constant[k] = -1.5 / width;
      change_linear[k] = 4 * pi * pi / (width * width);
    }
  }
  __syncthreads();
  const T *grad = static_cast<const T *>(out.grad) + maps.offset[map];
  const int size_y = atom.last[1] - atom.first[1] + 1, size_z = atom.last[2] - atom.first[2] + 1;
  const std::int64_t n_points = static_cast<std::int64_t>(atom.last[0] - atom.first[0] + 1) * size_y * size_z;
  double total = 0, total_b = 0, by_step[3] = {0, 0, 0};
  for (std::int64_t point = threadIdx.x; point < n_points; point += threads) {
    const int z = atom.first[2] + static_cast<int>(point % size_z);
    const int y = atom.first[1] + static_cast<int>(point / size_z % size_y);
    const int x = atom.first[0] + static_cast<int>(point / size_z / size_y);
    const T dx = static_cast<T>(x - atom.base[0]) - atom.rest[0], dy = static_cast<T>(y - atom.base[1]) - atom.rest[1];
    const T eta = dy + m.yx * dx;
    const T zeta = static_cast<T>(z - atom.base[2]) - atom.rest[2] + m.zx * dx + m.zy * dy;
    const T r2 = m.xx * dx * dx + m.yy * eta * eta + m.zz * zeta * zeta;
    if (r2 > atom.shape.r2_max)
      continue;
    T value = 0, slope = 0, with_b = 0;
    for (int k = 0; k < n_terms; ++k) {
      const T term = atom.shape.weight[k] * power_of_2(-atom.shape.decay[k] * r2);
      value += term;
      slope -= static_cast<T>(ln_2) * atom.shape.decay[k] * term;
      with_b += static_cast<T>(change_constant[k] + change_linear[k] * r2) * term;
    }
    const T g = grad[(wrap(x, m.n[0]) * m.n[1] + wrap(y, m.n[1])) * m.n[2] + wrap(z, m.n[2])];
    const double by_z = 2 * m.zz * zeta * slope * g, by_y = 2 * m.yy * eta * slope * g;
    total += value * g;
    total_b += with_b * g;
    by_step[2] += by_z;
    by_step[1] += by_y + m.zy * by_z;
    by_step[0] += 2 * m.xx * dx * slope * g + m.yx * by_y + m.zx * by_z;
  }
  const double mine[5] = {total, total_b, by_step[0], by_step[1], by_step[2]};
  for (int q = 0; q < 5; ++q)
    sums[q][threadIdx.x] = mine[q];
  for (int half = threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half)
      for (int q = 0; q < 5; ++q)
        sums[q][threadIdx.x] += sums[q][threadIdx.x + half];
  }
  if (threadIdx.x == 0) {
    const double occupancy = static_cast<const T *>(maps.occupancy)[index];
    static_cast<T *>(out.occupancy)[index] = static_cast<T>(sums[0][0]);
    static_cast<T *>(out.b_iso)[index] = static_cast<T>(occupancy * sums[1][0]);
    for (int x = 0; x < 3; ++x) { // the atom moves against the steps
      double sum = 0;
      for (int axis = 0; axis < 3; ++axis)
        sum -= m.to_grid[3 * axis + x] * sums[2 + axis][0];
      static_cast<T *>(out.coords)[3 * index + x] = static_cast<T>(occupancy * sum);
    }
  }
}

} // namespace

std::int64_t density_map_workspace(const AtomMaps &maps) {
  return maps.n_atoms * static_cast<std::int64_t>(maps.wide ? sizeof(PlacedAtom<double>) : sizeof(PlacedAtom<float>));
}

int density_map_cuda(const AtomMaps &maps, const DensityBricks &bricks, void *density, void *stream) {
  if (bricks.n == 0)
    return cudaSuccess;
  const auto launch = [&](auto *voxels) {
    using T = std::remove_pointer_t<decltype(voxels)>;
    const auto s = static_cast<cudaStream_t>(stream);
    auto *placed = static_cast<PlacedAtom<T> *>(bricks.workspace);
    if (maps.n_atoms > 0)
      place_atoms_kernel<T>
          <<<static_cast<unsigned>((maps.n_atoms + threads - 1) / threads), threads, 0, s>>>(maps, placed);
    density_map_kernel<T><<<static_cast<unsigned>(bricks.n), threads, 0, s>>>(maps, placed, bricks.ptr, voxels);
  };
  if (maps.wide)
    launch(static_cast<double *>(density));
  else
    launch(static_cast<float *>(density));
  return cudaGetLastError();
}

int density_map_backward_cuda(const AtomMaps &maps, const AtomGradients &out, void *stream) {
  if (maps.n_atoms == 0)
    return cudaSuccess;
  const auto s = static_cast<cudaStream_t>(stream);
  const auto blocks = static_cast<unsigned>(maps.n_atoms);
  if (maps.wide)
    density_map_backward_kernel<double><<<blocks, threads, 0, s>>>(maps, out);
  else
    density_map_backward_kernel<float><<<blocks, threads, 0, s>>>(maps, out);
  return cudaGetLastError();
}

} // namespace xtalfast
