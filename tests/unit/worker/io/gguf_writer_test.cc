#include "worker/io/gguf_writer.h"

#include <gtest/gtest.h>

#include <cstring>

#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "worker/io/gguf.h"

namespace walsh {
namespace {

using walsh::testing::TempDir;

TEST(GgufWriterTest, OurReaderReadsWhatWasWritten) {
  const TempDir dir;
  GgufMetadata metadata;
  metadata.SetString("general.architecture", "llama");
  metadata.SetUint32("a.number", 4'000'000'000u);
  metadata.SetFloat32("a.float", 0.5f);
  metadata.SetBool("a.truth", true);
  metadata.SetStrings("some.strings", {"", "zwei", "three"});
  metadata.SetFloats("some.floats", {1.5f, -2.0f});
  metadata.SetInts("some.integers", {-1, 7});
  ASSERT_OK_AND_ASSIGN(
      const auto writer,
      GgufWriter::Create(dir / "x.gguf", metadata,
                         {{.name = "first", .dims = {3}, .type = StorageType::kF32},
                          {.name = "second", .dims = {32, 2}, .type = StorageType::kQ8_0}}));
  const std::vector<float> first = {1, 2, 3};
  ASSERT_OK(writer->Append(std::as_bytes(std::span(first)).subspan(0, 4)));
  ASSERT_OK(writer->Append(std::as_bytes(std::span(first)).subspan(4)));
  const std::string second(2 * 34, 'q');
  ASSERT_OK(writer->Append(std::as_bytes(std::span(second))));
  ASSERT_OK(writer->Finish());

  ASSERT_OK_AND_ASSIGN(const auto file, OpenRandomAccessFile(dir / "x.gguf"));
  ASSERT_OK_AND_ASSIGN(const GgufContents contents, ParseGguf(*file));
  EXPECT_EQ(contents.metadata.size(), 7u);
  EXPECT_EQ(contents.metadata.at("general.architecture"), GgufValue(std::string("llama")));
  EXPECT_EQ(contents.metadata.at("a.number"), GgufValue(int64_t{4'000'000'000}));
  EXPECT_EQ(contents.metadata.at("a.float"), GgufValue(0.5));
  EXPECT_EQ(contents.metadata.at("a.truth"), GgufValue(true));
  EXPECT_EQ(contents.metadata.at("some.strings"),
            GgufValue(std::vector<std::string>{"", "zwei", "three"}));
  EXPECT_EQ(contents.metadata.at("some.floats"), GgufValue(std::vector<double>{1.5, -2.0}));
  EXPECT_EQ(contents.metadata.at("some.integers"), GgufValue(std::vector<int64_t>{-1, 7}));
  ASSERT_EQ(contents.tensors.size(), 2u);
  EXPECT_EQ(contents.tensors[1].name, "second");
  EXPECT_EQ(contents.tensors[1].dims, (std::vector<int64_t>{32, 2}));
  EXPECT_EQ(contents.tensors[1].type, StorageType::kQ8_0);
  std::string read(second.size(), '\0');
  ASSERT_OK(file->ReadAt(contents.tensors[1].offset, std::as_writable_bytes(std::span(read))));
  EXPECT_EQ(read, second);
}

TEST(GgufWriterTest, DoesNotReplaceAFile) {
  const TempDir dir;
  ASSERT_OK(GgufWriter::Create(dir / "x.gguf", {}, {}));
  EXPECT_FALSE(GgufWriter::Create(dir / "x.gguf", {}, {}).ok());
}

}  // namespace
}  // namespace walsh
