// Mutations of GGUF files that leave lengths and the place of the data right, so that what lies
// behind them is reached.
#pragma once

#include <cstddef>
#include <cstdint>

namespace walsh::fuzz {

// LLVMFuzzerCustomMutator of a target whose input is a GGUF file: a string with other bytes and the
// length that it then has, or another number. A quarter of the changes, and all where the walk
// through the file finds nothing, are libFuzzer's own.
size_t MutateGgufInput(uint8_t* data, size_t size, size_t size_max, uint32_t seed);

}  // namespace walsh::fuzz
