// Mutations of protobuf messages by their descriptors, so that every input is a message and every
// field is reached, new ones too.
#pragma once

#include <google/protobuf/message.h>

#include <cstddef>
#include <cstdint>

namespace walsh::fuzz {

// LLVMFuzzerCustomMutator of a target whose input is a serialized message: one change to one field,
// at any depth. `message` is empty and of the input's type; what of the input is no such message
// becomes an empty one.
size_t MutateMessageInput(google::protobuf::Message* message, uint8_t* data, size_t size,
                          size_t size_max, uint32_t seed);

}  // namespace walsh::fuzz
