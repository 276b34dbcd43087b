// Products of bfloat16 words on AMX, the matrix unit of some x86-64 processors.
#pragma once

#include "product.h"

namespace resfuse {

// Whether this processor and its system have AMX for bfloat16 and an example comes out right; probed once. It has not
// been measured on such a processor, and its logic is tested on a model of the unit: hence the example.
bool amx_works();

// As in product.h.
void multiply_amx(
    int64_t rows, int64_t columns, int64_t depth, Left a, Right b, float* c, int64_t stride, bool accumulate,
    Ahead* ahead);
void multiply_taps_amx(
    int64_t rows, int64_t columns, const Taps& taps, const void* a, int64_t a_depth, const int64_t* a_rows, Right b,
    float* c, int64_t stride, bool accumulate, Ahead* ahead);

}  // namespace resfuse
