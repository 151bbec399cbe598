// Every rule of the GGUF container has a file that breaks it.

#include "worker/io/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <span>
#include <string>

#include "tests/testing/checkpoint_bytes.h"
#include "tests/testing/status_matchers.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using walsh::testing::GgufBuilder;
using walsh::testing::Raw;
using walsh::testing::StatusIs;

absl::StatusOr<GgufContents> Parse(const std::string& bytes) {
  const auto file = MemoryFile("model.gguf", std::as_bytes(std::span(bytes)));
  return ParseGguf(*file);
}

template <typename T>
const T& Get(const GgufContents& contents, const char* key) {
  return std::get<T>(contents.metadata.at(key));
}

std::string Text(const std::string& text) { return Raw(static_cast<uint64_t>(text.size())) + text; }

TEST(GgufTest, ReadsEveryValueType) {
  const std::string bytes = GgufBuilder()
                                .RawValue("u8", 0, Raw(uint8_t{200}))
                                .RawValue("i8", 1, Raw(int8_t{-2}))
                                .RawValue("u16", 2, Raw(uint16_t{65535}))
                                .RawValue("i16", 3, Raw(int16_t{-3}))
                                .Uint32("u32", 4000000000u)
                                .Int32("i32", -4)
                                .Float32("f32", 1.5f)
                                .Bool("yes", true)
                                .String("text", "é")
                                .RawValue("u64", 10, Raw(uint64_t{1} << 62))
                                .RawValue("i64", 11, Raw(int64_t{-5}))
                                .RawValue("f64", 12, Raw(0.1))
                                .Strings("words", {"a", "", "c"})
                                .Floats("floats", {0.5f, -1.0f})
                                .Ints("ints", {7, -8})
                                .RawValue("flags", 9, Raw(7u) + Raw(uint64_t{2}) + "\1" + '\0')
                                .Build();
  ASSERT_OK_AND_ASSIGN(const GgufContents out, Parse(bytes));
  EXPECT_EQ(Get<int64_t>(out, "u8"), 200);
  EXPECT_EQ(Get<int64_t>(out, "i8"), -2);
  EXPECT_EQ(Get<int64_t>(out, "u16"), 65535);
  EXPECT_EQ(Get<int64_t>(out, "i16"), -3);
  EXPECT_EQ(Get<int64_t>(out, "u32"), 4000000000);
  EXPECT_EQ(Get<int64_t>(out, "i32"), -4);
  EXPECT_EQ(Get<double>(out, "f32"), 1.5);
  EXPECT_TRUE(Get<bool>(out, "yes"));
  EXPECT_EQ(Get<std::string>(out, "text"), "é");
  EXPECT_EQ(Get<int64_t>(out, "u64"), int64_t{1} << 62);
  EXPECT_EQ(Get<int64_t>(out, "i64"), -5);
  EXPECT_EQ(Get<double>(out, "f64"), 0.1);
  EXPECT_EQ(Get<std::vector<std::string>>(out, "words"), (std::vector<std::string>{"a", "", "c"}));
  EXPECT_EQ(Get<std::vector<double>>(out, "floats"), (std::vector<double>{0.5, -1.0}));
  EXPECT_EQ(Get<std::vector<int64_t>>(out, "ints"), (std::vector<int64_t>{7, -8}));
  EXPECT_EQ(Get<std::vector<int64_t>>(out, "flags"), (std::vector<int64_t>{1, 0}));
}

TEST(GgufTest, PlacesTensorsAtTheAlignment) {
  for (const uint32_t version : {2u, 3u}) {
    const std::string bytes = GgufBuilder()
                                  .Version(version)
                                  .Tensor("a", {3, 2}, 0, std::string(24, 'a'))
                                  .Tensor("b", {32}, 8, std::string(34, 'b'))
                                  .Build();
    ASSERT_OK_AND_ASSIGN(const GgufContents out, Parse(bytes));
    ASSERT_EQ(out.tensors.size(), 2u);
    EXPECT_EQ(out.tensors[0].dims, (std::vector<int64_t>{3, 2}));
    EXPECT_EQ(out.tensors[0].size_bytes, 24);
    EXPECT_EQ(bytes.substr(static_cast<size_t>(out.tensors[0].offset), 24), std::string(24, 'a'));
    EXPECT_EQ(out.tensors[1].type, StorageType::kQ8_0);
    EXPECT_EQ(bytes.substr(static_cast<size_t>(out.tensors[1].offset), 34), std::string(34, 'b'));
  }
}

struct BadFile {
  const char* name;
  std::string bytes;
  absl::StatusCode code;
  const char* message;
};

class BadGgufTest : public ::testing::TestWithParam<BadFile> {};

TEST_P(BadGgufTest, IsRefused) {
  EXPECT_THAT(Parse(GetParam().bytes), StatusIs(GetParam().code, HasSubstr(GetParam().message)));
}

std::string Value(uint32_t type, const std::string& value) {
  return GgufBuilder().RawValue("k", type, value).Build();
}
std::string Array(uint32_t type, uint64_t count, const std::string& items) {
  return Value(9, Raw(type) + Raw(count) + items);
}
std::string Tensor(const std::vector<uint64_t>& dims, uint32_t type, size_t n_bytes) {
  return GgufBuilder().Tensor("t", dims, type, std::string(n_bytes, '\0')).Build();
}
// Two 32-byte tensors, of which the second has the given offset, and data enough for either.
std::string Second(uint64_t offset) {
  std::string bytes =
      GgufBuilder().RawTensor("a", {8}, 0, 0).RawTensor("b", {8}, 0, offset).Build();
  bytes.resize((bytes.size() + 31) / 32 * 32 + 96, '\0');
  return bytes;
}

// Five arrays of 2 million bytes: each within its limit, not all of them together.
std::string ManyItems() {
  GgufBuilder gguf;
  const std::string items(2'000'000, '\1');
  for (int i = 0; i < 5; ++i) {
    gguf.RawValue("k" + std::to_string(i), 9, Raw(0u) + Raw(uint64_t{items.size()}) + items);
  }
  return gguf.Build();
}

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr auto kDataLoss = absl::StatusCode::kDataLoss;
constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;

INSTANTIATE_TEST_SUITE_P(
    Rules, BadGgufTest,
    ::testing::Values(
        BadFile{"EmptyFile", "", kDataLoss, "truncated: the magic"},
        BadFile{"WrongMagic", "GGML" + std::string(40, '\0'), kInvalid,
                "does not begin with 'GGUF'"},
        BadFile{"Version1", GgufBuilder().Version(1).Build(), kUnimplemented,
                "GGUF version 1 is not supported; supported: 2, 3"},
        BadFile{"Version4", GgufBuilder().Version(4).Build(), kUnimplemented, "version 4"},
        BadFile{"BigEndian", GgufBuilder().Version(0x03000000u).Build(), kUnimplemented,
                "big-endian"},
        BadFile{"TooManyTensors", GgufBuilder().Counts(65537, 0).Build(), kInvalid,
                "65537 tensors, at most 65536"},
        BadFile{"TensorsOf2To64", GgufBuilder().Counts(~uint64_t{0}, 0).Build(), kInvalid,
                "18446744073709551615 tensors"},
        BadFile{"TooManyKeys", GgufBuilder().Counts(0, 65537).Build(), kInvalid,
                "65537 keys, at most 65536"},
        BadFile{"MoreKeysThanBytes", GgufBuilder().Counts(0, 60000).Build(), kDataLoss,
                "60000 keys and 0 tensors take at least 780000 bytes"},
        BadFile{"KeyTooLong", GgufBuilder().Uint32(std::string(257, 'k'), 1).Build(), kInvalid,
                "key 0 has 257 bytes, at most 256"},
        BadFile{"KeyEmpty", GgufBuilder().Uint32("", 1).Build(), kInvalid,
                "key 0 is not a printable ASCII name"},
        BadFile{"KeyNotPrintable", GgufBuilder().Uint32("a\nb", 1).Build(), kInvalid,
                "not a printable"},
        BadFile{"KeyTwice", GgufBuilder().Uint32("k", 1).Uint32("k", 2).Build(), kInvalid,
                "key 'k' appears twice"},
        BadFile{"ValueTypeUnknown", Value(13, std::string(8, '\0')), kInvalid,
                "key 'k' has the unknown type 13"},
        BadFile{"BooleanOf2", Value(7, "\2"), kInvalid, "holds the boolean 2"},
        BadFile{"NumberBeyond2To63", Value(10, Raw(~uint64_t{0})), kInvalid, "beyond 2^63"},
        BadFile{"ValueTruncated", Value(12, "1234"), kDataLoss, "needs 8 bytes, 4 are left"},
        BadFile{"StringTooLong", Value(8, Raw(uint64_t{(16 << 20) + 1}) + "x"), kInvalid,
                "key 'k' has 16777217 bytes, at most 16777216"},
        BadFile{"StringBeyondFile", Value(8, Raw(uint64_t{1000}) + "x"), kDataLoss,
                "key 'k' has 1000 bytes, 1 are left"},
        BadFile{"StringOf2To64", Value(8, Raw(~uint64_t{0})), kInvalid,
                "key 'k' has 18446744073709551615 bytes"},
        BadFile{"StringNotUtf8", Value(8, Text("\xff")), kInvalid, "key 'k' is not UTF-8"},
        BadFile{"ArrayOfArrays", Array(9, 1, std::string(20, '\0')), kUnimplemented,
                "key 'k' is an array of arrays"},
        BadFile{"ArrayTypeUnknown", Array(99, 1, "x"), kInvalid, "unknown item type 99"},
        BadFile{"ArrayTooLong", Array(4, (4 << 20) + 1, ""), kInvalid,
                "key 'k' has 4194305 items, at most 4194304"},
        BadFile{"ArrayOf2To64", Array(4, ~uint64_t{0}, ""), kInvalid, "at most 4194304"},
        BadFile{"ArrayBeyondFile", Array(4, 100, "1234"), kDataLoss,
                "key 'k' has 100 items of at least 4 bytes, 4 are left"},
        BadFile{"StringArrayBeyondFile", Array(8, 100, Text("a")), kDataLoss,
                "100 items of at least 8 bytes"},
        BadFile{"ArraysTooLongTogether", ManyItems(), kInvalid, "more than 8388608 array items"},
        BadFile{"AlignmentZero", GgufBuilder().Uint32("general.alignment", 0).Build(), kInvalid,
                "general.alignment must be a power of two from 8 to 1048576, is 0"},
        BadFile{"AlignmentOdd", GgufBuilder().Uint32("general.alignment", 48).Build(), kInvalid,
                "is 48"},
        BadFile{"AlignmentHuge", GgufBuilder().Uint32("general.alignment", 1u << 31).Build(),
                kInvalid, "is 2147483648"},
        BadFile{"AlignmentIsText", GgufBuilder().String("general.alignment", "32").Build(),
                kInvalid, "general.alignment must be"},
        BadFile{"TensorNameTooLong",
                GgufBuilder().Tensor(std::string(257, 't'), {8}, 0, std::string(32, '\0')).Build(),
                kInvalid, "the name of tensor 0 has 257 bytes"},
        BadFile{"TensorTwice",
                GgufBuilder().RawTensor("t", {8}, 0, 0).RawTensor("t", {8}, 0, 32).Build(),
                kInvalid, "tensor 't' appears twice"},
        BadFile{"NoDimensions", Tensor({}, 0, 32), kInvalid, "0 dimensions, must be 1 to 4"},
        BadFile{"FiveDimensions", Tensor({8, 1, 1, 1, 1}, 0, 32), kInvalid, "5 dimensions"},
        BadFile{"DimensionZero", Tensor({8, 0}, 0, 32), kInvalid, "a dimension is 0"},
        BadFile{"DimensionBeyond2To63", Tensor({~uint64_t{0}}, 0, 32), kInvalid, "beyond 2^63"},
        BadFile{"ShapeOverflows", Tensor({uint64_t{1} << 32, uint64_t{1} << 32}, 0, 32), kInvalid,
                "size overflows 64 bits"},
        BadFile{"SizeOverflows", Tensor({uint64_t{1} << 62}, 0, 32), kInvalid,
                "size overflows 64 bits"},
        BadFile{"TypeUnsupported", Tensor({256}, 16, 66), kUnimplemented,
                "tensor 't': type IQ2_XXS (16) is not supported"},
        BadFile{"TypeUnknown", Tensor({256}, 1000, 66), kUnimplemented, "type unknown (1000)"},
        BadFile{"PartOfABlock", Tensor({48}, 8, 64), kInvalid,
                "rows of 48 elements are no whole Q8_0 blocks of 32"},
        BadFile{"OffsetNotAligned", Second(40), kInvalid,
                "tensor 'b': offset 40 is no multiple of the alignment 32"},
        BadFile{"Overlap", Second(0), kInvalid, "overlaps"},
        BadFile{"Gap", Second(64), kInvalid, "leaves a gap"},
        BadFile{"OffsetBeyond2To63", Second(uint64_t{1} << 63), kInvalid, "beyond 2^63"},
        BadFile{"DataTruncated", GgufBuilder().RawTensor("t", {uint64_t{1} << 40}, 0, 0).Build(),
                kDataLoss, "truncated: tensor 't' has 4398046511104 bytes"},
        BadFile{"TrailingBytes", Tensor({8}, 0, 32) + std::string(33, '\0'), kInvalid,
                "bytes after the last tensor belong to none"}),
    [](const auto& param_info) { return std::string(param_info.param.name); });

TEST(GgufTest, NoPrefixParses) {
  const std::string whole = GgufBuilder()
                                .String("general.name", "x")
                                .Strings("words", {"a", "b"})
                                .Tensor("t", {8, 2}, 0, std::string(64, '\0'))
                                .Build();
  ASSERT_OK(Parse(whole));
  for (size_t n = 0; n < whole.size(); ++n) EXPECT_FALSE(Parse(whole.substr(0, n)).ok()) << n;
}

}  // namespace
}  // namespace walsh
