// Every rule of the safetensors reader has a file that breaks it.

#include "worker/io/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <span>
#include <string>

#include "tests/testing/checkpoint_bytes.h"
#include "tests/testing/status_matchers.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using walsh::testing::Raw;
using walsh::testing::SafetensorsBytes;
using walsh::testing::StatusIs;

absl::StatusOr<std::vector<SafetensorsEntry>> Parse(const std::string& bytes) {
  const auto file = MemoryFile("model.safetensors", std::as_bytes(std::span(bytes)));
  return ParseSafetensors(*file);
}

TEST(SafetensorsTest, ReadsTensorsInTheOrderOfTheirBytes) {
  const std::string bytes =
      SafetensorsBytes(R"({"b":{"dtype":"F16","shape":[2,3],"data_offsets":[8,20]},)"
                       R"("__metadata__":{"format":"pt"},)"
                       R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                       R"("empty":{"dtype":"F32","shape":[0,7],"data_offsets":[20,20]},)"
                       R"("scalar":{"dtype":"I64","shape":[],"data_offsets":[20,28]}}   )",
                       std::string(28, 'x'));
  ASSERT_OK_AND_ASSIGN(const auto entries, Parse(bytes));
  ASSERT_EQ(entries.size(), 4u);
  EXPECT_EQ(entries[0].name, "a");
  EXPECT_EQ(entries[1].name, "b");
  EXPECT_EQ(entries[1].dtype, "F16");
  EXPECT_EQ(entries[1].shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(entries[1].size_bytes, 12);
  EXPECT_EQ(entries[1].offset, entries[0].offset + 8);
  EXPECT_EQ(entries[2].size_bytes, 0);
  EXPECT_EQ(entries[3].size_bytes, 8);
}

TEST(SafetensorsTest, AnEmptyHeaderNeedsAnEmptyRest) {
  EXPECT_OK(Parse(SafetensorsBytes("{}", "")));
  EXPECT_THAT(Parse(SafetensorsBytes("{}", "x")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("belong to none")));
}

struct BadFile {
  const char* name;
  std::string bytes;
  absl::StatusCode code;
  const char* message;
};

class BadSafetensorsTest : public ::testing::TestWithParam<BadFile> {};

TEST_P(BadSafetensorsTest, IsRefused) {
  EXPECT_THAT(Parse(GetParam().bytes), StatusIs(GetParam().code, HasSubstr(GetParam().message)));
}

// One tensor "x" of 8 bytes, with the given members.
std::string One(const std::string& members) {
  return SafetensorsBytes("{\"x\":{" + members + "}}", std::string(8, '\0'));
}

// Two tensors of 8 bytes at the given places.
std::string Two(const std::string& first, const std::string& second, size_t data_bytes) {
  return SafetensorsBytes(R"({"x":{"dtype":"F32","shape":[2],"data_offsets":)" + first +
                              R"(},"y":{"dtype":"F32","shape":[2],"data_offsets":)" + second + "}}",
                          std::string(data_bytes, '\0'));
}

std::string ManyTensors(int n) {
  std::string header = "{";
  for (int i = 0; i < n; ++i) {
    header += (i == 0 ? "\"" : ",\"") + std::to_string(i) +
              R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
  }
  return SafetensorsBytes(header + "}", "");
}

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kDataLoss = absl::StatusCode::kDataLoss;
constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;

INSTANTIATE_TEST_SUITE_P(
    Rules, BadSafetensorsTest,
    ::testing::Values(
        BadFile{"EmptyFile", "", kDataLoss, "truncated: 0 bytes"},
        BadFile{"SevenBytes", "1234567", kDataLoss, "truncated: 7 bytes"},
        BadFile{"HeaderOf2To63", Raw(uint64_t{1} << 63) + "{}", kInvalid,
                "header of 9223372036854775808 bytes, at most 33554432"},
        BadFile{"HeaderOver32MiB", Raw(uint64_t{(32 << 20) + 1}) + "{}", kInvalid,
                "header of 33554433 bytes, at most 33554432"},
        BadFile{"HeaderBeyondFile", Raw(uint64_t{100}) + "{}", kDataLoss,
                "header of 100 bytes in a file of 10"},
        BadFile{"HeaderEmpty", SafetensorsBytes("", ""), kInvalid, "does not start with '{'"},
        BadFile{"HeaderStartsWithSpace", SafetensorsBytes(" {}", ""), kInvalid,
                "does not start with '{'"},
        BadFile{"HeaderIsAnArray", SafetensorsBytes("[]", ""), kInvalid, "does not start with '{'"},
        BadFile{"HeaderNotUtf8", SafetensorsBytes("{\"\xc3\x28\":1}", ""), kInvalid, "not UTF-8"},
        BadFile{"HeaderNotJson", SafetensorsBytes("{\"x\"", ""), kInvalid,
                "header: invalid JSON at byte"},
        BadFile{"TextAfterTheHeader", SafetensorsBytes("{} {}", ""), kInvalid, "invalid JSON"},
        BadFile{"TooDeep", SafetensorsBytes(R"({"x":{"shape":[[1]]}})", ""), kInvalid,
                "unexpected an array"},
        BadFile{"TooDeepObject", SafetensorsBytes(R"({"x":{"dtype":{"a":1}}})", ""), kInvalid,
                "nested deeper"},
        BadFile{"BombOfBrackets", SafetensorsBytes("{\"x\":" + std::string(100000, '['), ""),
                kInvalid, "unexpected an array"},
        BadFile{"DuplicateTensor",
                SafetensorsBytes(R"({"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},)"
                                 R"("x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})",
                                 ""),
                kInvalid, "key 'x' appears twice"},
        BadFile{"DuplicateMember",
                One(R"("dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8])"), kInvalid,
                "tensor 'x': member 'dtype' appears twice"},
        BadFile{"DuplicateMetadata", SafetensorsBytes(R"({"__metadata__":{"a":"1","a":"2"}})", ""),
                kInvalid, "__metadata__ has key 'a' twice"},
        BadFile{"MetadataNotText", SafetensorsBytes(R"({"__metadata__":{"a":1}})", ""), kInvalid,
                "unexpected a number"},
        BadFile{"TensorIsANumber", SafetensorsBytes(R"({"x":1})", ""), kInvalid,
                "tensor 'x': unexpected a number"},
        BadFile{"UnknownMember",
                One(R"("dtype":"F32","shape":[2],"data_offsets":[0,8],"extra":"1")"), kInvalid,
                "unknown member 'extra'"},
        BadFile{"DtypeUnknown", One(R"("dtype":"F31","shape":[2],"data_offsets":[0,8])"),
                kUnimplemented, "tensor 'x': dtype 'F31' is not known"},
        BadFile{"DtypeMissing", One(R"("shape":[2],"data_offsets":[0,8])"), kInvalid,
                "member 'dtype' is missing"},
        BadFile{"ShapeMissing", One(R"("dtype":"F32","data_offsets":[0,8])"), kInvalid,
                "member 'shape' is missing"},
        BadFile{"OffsetsMissing", One(R"("dtype":"F32","shape":[2])"), kInvalid,
                "member 'data_offsets' is missing"},
        BadFile{"ThreeOffsets", One(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])"),
                kInvalid, "data_offsets has more than 2"},
        BadFile{"OneOffset", One(R"("dtype":"F32","shape":[2],"data_offsets":[0])"), kInvalid,
                "data_offsets has no 2 numbers"},
        BadFile{"NineDimensions",
                One(R"("dtype":"F32","shape":[2,1,1,1,1,1,1,1,1],"data_offsets":[0,8])"), kInvalid,
                "more than 8 dimensions"},
        BadFile{"NegativeDimension", One(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"),
                kInvalid, "unexpected a negative number in 'shape'"},
        BadFile{"FractionalDimension", One(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])"),
                kInvalid, "unexpected a fraction in 'shape'"},
        BadFile{"DimensionBeyond2To63",
                One(R"("dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,8])"),
                kInvalid, "beyond 2^63"},
        BadFile{"ProductOverflows",
                One(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8])"),
                kInvalid, "size overflows 64 bits"},
        // 2^62 elements of 4 bytes come to 0 in 64 bits.
        BadFile{"ProductWrapsToZero",
                One(R"("dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0])"),
                kInvalid, "size overflows 64 bits"},
        // No elements, but a product that overflows for whoever takes it in another order.
        BadFile{"ProductOverflowsBesideAZero",
                One(R"("dtype":"F32","shape":[4611686018427387904,4,0],"data_offsets":[0,0])"),
                kInvalid, "size overflows 64 bits"},
        BadFile{"SizeDiffers", One(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"), kInvalid,
                "data_offsets span 8 bytes, its shape and dtype take 12"},
        BadFile{"EndBeforeBegin", One(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"),
                kInvalid, "ends at 0 before it begins at 8"},
        BadFile{"Overlap", Two("[0,8]", "[4,12]", 12), kInvalid,
                "tensor 'y': overlaps the tensor before it: begins at 4, expected 8"},
        BadFile{"SamePlace", Two("[0,8]", "[0,8]", 8), kInvalid, "overlaps"},
        BadFile{"Gap", Two("[0,8]", "[12,20]", 20), kInvalid,
                "tensor 'y': leaves a gap after the tensor before it: begins at 12, expected 8"},
        BadFile{"GapAtTheStart", Two("[4,12]", "[12,20]", 20), kInvalid, "leaves a gap"},
        BadFile{"Truncated", Two("[0,8]", "[8,16]", 15), kDataLoss,
                "truncated: tensor 'y' ends at byte 16 of the data, the file has 15"},
        BadFile{"TrailingBytes", Two("[0,8]", "[8,16]", 17), kInvalid,
                "1 bytes after the last tensor belong to none"},
        BadFile{"NameEmpty",
                SafetensorsBytes(R"({"":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", ""),
                kInvalid, "name has 0 bytes"},
        BadFile{"NameTooLong", SafetensorsBytes("{\"" + std::string(257, 'n') + "\":{}}", ""),
                kInvalid, "name has 257 bytes, must be 1 to 256"},
        BadFile{"NameNotPrintable", SafetensorsBytes("{\"a\\u0007\":{}}", ""), kInvalid,
                "not printable"},
        BadFile{"TooManyTensors", ManyTensors(65537), kInvalid, "more than 65536 tensors"}),
    [](const auto& param_info) { return std::string(param_info.param.name); });

TEST(SafetensorsTest, TakesAsManyTensorsAsAllowed) {
  ASSERT_OK_AND_ASSIGN(const auto entries, Parse(ManyTensors(65536)));
  EXPECT_EQ(entries.size(), 65536u);
}

// Any prefix of a good file is refused, and so is any single damaged byte of the length.
TEST(SafetensorsTest, NoPrefixParses) {
  const std::string whole = Two("[0,8]", "[8,16]", 16);
  ASSERT_OK(Parse(whole));
  for (size_t n = 0; n < whole.size(); ++n) {
    EXPECT_FALSE(Parse(whole.substr(0, n)).ok()) << n;
  }
}

}  // namespace
}  // namespace walsh
