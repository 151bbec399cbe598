// What every operation requires of its parameters, whatever device runs it.
//
// Errors:  INVALID_ARGUMENT  a null pointer, a negative or too large size, a stride below its row,
//          sizes that do not fit together, an index outside its range; the message names operation,
//          field, limit and value
// Threads: safe
#pragma once

#include <span>

#include "absl/status/status.h"
#include "worker/kernels/packed_matrix.h"
#include "worker/kernels/params.h"

namespace walsh::kernels {

absl::Status Validate(const MatmulParams& p);
absl::Status Validate(const GramParams& p);
absl::Status Validate(const CrossGramParams& p);
absl::Status Validate(const SubtractProductParams& p);
absl::Status Validate(const RmsNormParams& p);
absl::Status Validate(const RopeParams& p);
absl::Status Validate(const AttentionParams& p);
absl::Status Validate(const SiluMultiplyParams& p);
absl::Status Validate(const GeluMultiplyParams& p);
absl::Status Validate(const AddParams& p);
absl::Status Validate(const BlockWalshParams& p);
absl::Status Validate(const FakeQuantizeParams& p);
absl::Status Validate(const CrossEntropyParams& p);
absl::Status Validate(const KlDivergenceParams& p);
absl::Status Validate(const PackedMatmulParams& p);
absl::Status ValidateBatch(std::span<const AttentionParams> items);
absl::Status ValidateBatch(std::span<const PackedMatmulParams> items);

}  // namespace walsh::kernels
