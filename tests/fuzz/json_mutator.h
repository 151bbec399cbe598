// Mutations of JSON that leave it JSON, so that what lies behind the syntax is reached.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace walsh::fuzz {

// One change to one value of the document: another value, a number near it, a string with other
// bytes, an element less, one that is a copy of another, a key renamed. nullopt when `text` is not
// JSON, or nests deeper than any parser of ours reads.
std::optional<std::string> MutateJson(std::string_view text, uint32_t seed);

// LLVMFuzzerCustomMutator of a target whose input is JSON: a quarter of the changes, and all where
// there is no JSON, are libFuzzer's own.
size_t MutateJsonInput(uint8_t* data, size_t size, size_t size_max, uint32_t seed);

}  // namespace walsh::fuzz
