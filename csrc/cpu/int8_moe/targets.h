// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
//
// The instruction sets of a build, best first: each is compiled as a file of its name,
// with flags of its own (CMakeLists.txt).
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

}  // namespace int8_moe
