// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#include "neon_dotprod.h"

#if defined(__linux__)
  #include <asm/hwcap.h>
  #include <sys/auxv.h>
#endif

#include "experts.h"
#include "microkernel.h"
#include "router.h"
#include "targets.h"

namespace int8_moe {
namespace {

bool dotprod_supported() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return true;  // every Apple silicon
#endif
}

}  // namespace

extern const Isa INT8_MOE_TARGET(neon_dotprod) = {
    "neon_dotprod", dotprod_supported,
    run_experts<VectorMicrokernel<NeonDotprod>>, run_router};

}  // namespace int8_moe
