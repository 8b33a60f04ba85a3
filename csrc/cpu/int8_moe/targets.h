// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// The instruction sets of a build, best first. The file NAME.cpp defines the
// Isa of NAME: it includes the kernels that it uses, and CMakeLists.txt
// compiles it with that instruction set's flags.
#pragma once

#include "int8_moe.h"

#if defined(INT8_MOE_X86)
  #define INT8_MOE_TARGETS(X) \
    X(amx) X(avx512_vnni) X(avx2_vnni) X(avx512) X(avx2) X(portable)
#elif defined(INT8_MOE_NEON)
  #define INT8_MOE_TARGETS(X) X(neon_i8mm) X(neon_dotprod) X(portable)
#else
  #define INT8_MOE_TARGETS(X) X(portable)
#endif

#define INT8_MOE_TARGET(name) name##_target

namespace int8_moe {

#define INT8_MOE_DECLARE(name) extern const Isa INT8_MOE_TARGET(name);
INT8_MOE_TARGETS(INT8_MOE_DECLARE)
#undef INT8_MOE_DECLARE

#if defined(__x86_64__)
// Each file has its own copy. One shared copy could be that of a file whose
// flags the processor does not have.
namespace {
inline bool avx2_supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
inline bool avx512_supported() {
  return __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
}  // namespace
#endif

}  // namespace int8_moe
