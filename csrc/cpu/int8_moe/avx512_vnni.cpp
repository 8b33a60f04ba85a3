// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vLLM project
#include "avx512_vnni.h"

#include "experts.h"
#include "microkernel.h"
#include "router.h"
#include "targets.h"

namespace int8_moe {

extern const Isa INT8_MOE_TARGET(avx512_vnni) = {
    "avx512_vnni", avx512_vnni_supported,
    run_experts<VectorMicrokernel<Avx512Vnni>>, run_router};

}  // namespace int8_moe
