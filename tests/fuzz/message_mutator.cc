#include "tests/fuzz/message_mutator.h"

#include <google/protobuf/descriptor.h>

#include <limits>
#include <random>
#include <string>

#include "common/utf8.h"
#include "tests/fuzz/mutate_bytes.h"

namespace walsh::fuzz {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

class Mutator {
 public:
  explicit Mutator(uint32_t seed) : random_(seed) {}

  void ChangeOne(Message* message) {
    const google::protobuf::Descriptor* type = message->GetDescriptor();
    if (type->field_count() == 0) return;
    const auto* field = type->field(Below(type->field_count()));
    if (field->is_repeated()) return ChangeRepeated(message, field);
    const Reflection* reflection = message->GetReflection();
    if (Below(8) == 0) return reflection->ClearField(message, field);
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      return ChangeOne(reflection->MutableMessage(message, field));
    }
    SetScalar(message, field);
  }

 private:
  int Below(int n) { return static_cast<int>(random_() % static_cast<uint32_t>(n)); }
  template <typename T, size_t n>
  T AnyOf(const T (&values)[n]) {
    return values[Below(n)];
  }

  // One element less, one more, or one that is changed.
  void ChangeRepeated(Message* message, const FieldDescriptor* field) {
    const Reflection* reflection = message->GetReflection();
    const int size = reflection->FieldSize(*message, field);
    if (size > 0 && Below(4) == 0) return reflection->RemoveLast(message, field);
    if (field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) return AddScalar(message, field);
    const bool is_new = size == 0 || Below(3) == 0;
    ChangeOne(is_new ? reflection->AddMessage(message, field)
                     : reflection->MutableRepeatedMessage(message, field, Below(size)));
  }

  // Cut to the field's width.
  int64_t Integer() {
    constexpr int64_t kInteresting[] = {0,
                                        1,
                                        2,
                                        3,
                                        4,
                                        8,
                                        16,
                                        20,
                                        32,
                                        64,
                                        100,
                                        128,
                                        1000,
                                        -1,
                                        1 << 15,
                                        1 << 20,
                                        std::numeric_limits<int32_t>::max(),
                                        std::numeric_limits<int32_t>::min(),
                                        std::numeric_limits<int64_t>::max(),
                                        std::numeric_limits<int64_t>::min()};
    return AnyOf(kInteresting);
  }
  double Real() {
    constexpr double kInteresting[] = {0,
                                       -0.0,
                                       0.5,
                                       1,
                                       2,
                                       -1,
                                       1e-9,
                                       10,
                                       1e308,
                                       0.9,
                                       2.01,
                                       std::numeric_limits<double>::min(),
                                       std::numeric_limits<double>::infinity(),
                                       std::numeric_limits<double>::quiet_NaN()};
    return AnyOf(kInteresting);
  }
  // A message with text that is no UTF-8 cannot be read: gRPC refuses it before any handler.
  std::string Text(const std::string& before) { return ReplaceInvalidUtf8(MutateBytes(before)); }
  // Of a value that its type has, mostly.
  int EnumNumber(const FieldDescriptor* field) {
    return Below(field->enum_type()->value_count() + 1);
  }

  void SetScalar(Message* message, const FieldDescriptor* field) {
    const Reflection* reflection = message->GetReflection();
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_INT32:
        return reflection->SetInt32(message, field, static_cast<int32_t>(Integer()));
      case FieldDescriptor::CPPTYPE_INT64:
        return reflection->SetInt64(message, field, Integer());
      case FieldDescriptor::CPPTYPE_UINT32:
        return reflection->SetUInt32(message, field, static_cast<uint32_t>(Integer()));
      case FieldDescriptor::CPPTYPE_UINT64:
        return reflection->SetUInt64(message, field, static_cast<uint64_t>(Integer()));
      case FieldDescriptor::CPPTYPE_DOUBLE:
        return reflection->SetDouble(message, field, Real());
      case FieldDescriptor::CPPTYPE_FLOAT:
        return reflection->SetFloat(message, field, static_cast<float>(Real()));
      case FieldDescriptor::CPPTYPE_BOOL:
        return reflection->SetBool(message, field, !reflection->GetBool(*message, field));
      case FieldDescriptor::CPPTYPE_ENUM:
        return reflection->SetEnumValue(message, field, EnumNumber(field));
      case FieldDescriptor::CPPTYPE_STRING:
        return reflection->SetString(message, field, Text(reflection->GetString(*message, field)));
      case FieldDescriptor::CPPTYPE_MESSAGE:
        return;
    }
  }

  // The repeated scalars of walsh.v1.
  void AddScalar(Message* message, const FieldDescriptor* field) {
    const Reflection* reflection = message->GetReflection();
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_INT32:
        return reflection->AddInt32(message, field, static_cast<int32_t>(Integer()));
      case FieldDescriptor::CPPTYPE_STRING:
        return reflection->AddString(message, field, Text(""));
      default:
        return;
    }
  }

  std::minstd_rand random_;
};

}  // namespace

size_t MutateMessageInput(Message* message, uint8_t* data, size_t size, size_t size_max,
                          uint32_t seed) {
  if (!message->ParseFromArray(data, static_cast<int>(size))) message->Clear();
  Mutator(seed).ChangeOne(message);
  return Deliver(message->SerializeAsString(), data, size_max);
}

}  // namespace walsh::fuzz
