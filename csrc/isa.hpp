// The instruction set that kernels compiled for several run with.
#pragma once

namespace xtalfast {

enum class Isa : int { portable, avx2, avx512 };

// The best that this processor has; the environment variable XTALFAST_SIMD (portable, avx2 or avx512), read at every
// call, asks for less. Throws std::invalid_argument for another value.
Isa chosen_isa();

const char *isa_name(Isa isa);

} // namespace xtalfast
