// All kernels of an instruction set `Isa`, as a table; included by kernels_<isa>.cpp only.

#ifndef SHARDMIX_ALL_KERNELS_H
#define SHARDMIX_ALL_KERNELS_H

#include "attention_kernels.h"
#include "element_kernels.h"
#include "product_kernels.h"
#include "prompt_kernels.h"

namespace shardmix {

template <class Isa>
static constexpr KernelTable table_of() {
    return {multiply<Isa>,   dequantize,       rms_norm<Isa>,  quantize<Isa>, gate<Isa>,
            softcap<Isa>,    rotate<Isa>,      write_cached<Isa>, attend<Isa>, attend_block<Isa>,
            find_above<Isa>, find_maxima<Isa>, sum_exponentials,  read_all<Isa>};
}

}  // namespace shardmix

#endif
