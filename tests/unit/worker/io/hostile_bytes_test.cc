// Damaged bytes by the thousand: a status or a result, never a crash (run under ASan and UBSan
// too), and nothing of the heap in what is written.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <malloc.h>
#include <sys/resource.h>

#include <atomic>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <span>
#include <string>
#include <thread>

#include "common/limits.h"
#include "tests/testing/checkpoint_bytes.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/tiny_model.h"
#include "worker/io/artifact_manifest.h"
#include "worker/io/checkpoint.h"
#include "worker/io/gguf.h"
#include "worker/io/model_config.h"
#include "worker/io/safetensors.h"
#include "worker/io/safetensors_writer.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using walsh::testing::Raw;
using walsh::testing::SafetensorsBytes;
using walsh::testing::StatusIs;
using walsh::testing::TempDir;
using walsh::testing::TinyModel;
using walsh::testing::TinyModelOptions;

std::string ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

// Replaces, removes, repeats or inserts a few bytes in the first `n_bytes`.
std::string Mutate(std::string bytes, size_t n_bytes, std::mt19937_64& random) {
  const uint64_t n_changes = 1 + random() % 4;
  for (uint64_t i = 0; i < n_changes; ++i) {
    if (bytes.empty()) return bytes;
    const size_t at = random() % std::min(n_bytes, bytes.size());
    switch (random() % 5) {
      case 0:
        bytes[at] = static_cast<char>(random());
        break;
      case 1:
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << (random() % 8)));
        break;
      case 2:
        bytes.erase(at, 1 + random() % 8);
        break;
      case 3:
        bytes.insert(at, bytes.substr(at, 1 + random() % 32));
        break;
      default:
        bytes.insert(at, "9");
        break;
    }
  }
  return bytes;
}

constexpr int kMutations = 20000;

template <typename Parse>
void ExpectSurvives(const std::string& good, size_t n_bytes, Parse parse) {
  std::mt19937_64 random(7);
  ASSERT_TRUE(parse(good));
  int n_accepted = 0;
  for (int i = 0; i < kMutations; ++i) n_accepted += parse(Mutate(good, n_bytes, random)) ? 1 : 0;
  // Some damage is harmless (a digit of an epsilon); most is not.
  EXPECT_LT(n_accepted, kMutations / 2);
}

TEST(HostileBytesTest, SafetensorsHeader) {
  const TempDir dir;
  TinyModel({.hidden = 32, .intermediate = 32, .n_layers = 1}).WriteHf(dir / "tiny");
  const std::string good = ReadAll(dir / "tiny/model.safetensors");
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, good.data(), 8);
  ExpectSurvives(good, 8 + header_bytes, [](const std::string& bytes) {
    const auto file = MemoryFile("m", std::as_bytes(std::span(bytes)));
    return ParseSafetensors(*file).ok();
  });
}

TEST(HostileBytesTest, GgufMetadata) {
  const TempDir dir;
  TinyModel({.hidden = 32, .intermediate = 32, .n_layers = 1}).WriteGguf(dir / "tiny.gguf");
  const std::string good = ReadAll(dir / "tiny.gguf");
  ExpectSurvives(good, 12000, [](const std::string& bytes) {
    const auto file = MemoryFile("m", std::as_bytes(std::span(bytes)));
    return ParseGguf(*file).ok();
  });
}

TEST(HostileBytesTest, ModelConfig) {
  const std::string good = TinyModel(TinyModelOptions{}).ConfigJson();
  ExpectSurvives(good, good.size(),
                 [](const std::string& text) { return ParseModelConfig(text).ok(); });
}

TEST(HostileBytesTest, Manifest) {
  const auto text =
      ManifestText({{"quantization", {{"bits", 4}, {"group_size", 32}}}},
                   {{"config.json", {.size_bytes = 3, .sha256 = {std::string(64, 'a')}}}});
  ASSERT_OK(text);
  ExpectSurvives(*text, text->size(),
                 [](const std::string& bytes) { return ParseManifest(bytes).ok(); });
}

// Processor time of this thread: other work on the machine does not count.
double CpuSeconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Headers at the limits of what they may claim: refused soon, whatever fills them.
TEST(HostileBytesTest, LargeHeadersTakeLittleTime) {
  constexpr double kSecondsMax = 5.0;  // under a sanitizer; otherwise below one
  const auto seconds = [](const std::string& bytes) {
    const double start = CpuSeconds();
    const auto file = MemoryFile("m", std::as_bytes(std::span(bytes)));
    EXPECT_FALSE(ParseSafetensors(*file).ok());
    return CpuSeconds() - start;
  };
  constexpr size_t kBytes = 31 << 20;
  std::string empty_keys = "{";
  while (empty_keys.size() < kBytes) empty_keys += "\"\":1,";
  EXPECT_LT(seconds(SafetensorsBytes(empty_keys, "")), kSecondsMax);
  std::string numbers = R"({"x":{"shape":[)";
  while (numbers.size() < kBytes) numbers += "1,";
  EXPECT_LT(seconds(SafetensorsBytes(numbers, "")), kSecondsMax);
  EXPECT_LT(seconds(SafetensorsBytes("{\"" + std::string(kBytes, 'n'), "")), kSecondsMax);
  EXPECT_LT(seconds(SafetensorsBytes("{" + std::string(kBytes, ' '), "")), kSecondsMax);
}

// A hundred strings at the limit of one are refused before they are all in memory.
TEST(HostileBytesTest, ASparseFileOfStringsIsRefused) {
  constexpr int64_t kBytesMax = int64_t{1} << 30;
  constexpr int kStrings = 200;
  const TempDir dir;
  const std::string path = dir / "sparse.gguf";
  std::ofstream out(path, std::ios::binary);
  out << "GGUF" << Raw(3u) << Raw(uint64_t{0}) << Raw(uint64_t{1}) << Raw(uint64_t{1}) << "k"
      << Raw(9u) << Raw(8u) << Raw(uint64_t{kStrings});
  for (int i = 0; i < kStrings; ++i) {
    out << Raw(static_cast<uint64_t>(limits::kGgufStringBytesMax));
    out.seekp(limits::kGgufStringBytesMax, std::ios::cur);
  }
  out << "\n";
  out.close();
  rusage before{};
  getrusage(RUSAGE_SELF, &before);
  const auto file = OpenRandomAccessFile(path);
  ASSERT_OK(file);
  EXPECT_THAT(ParseGguf(**file),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("more than 268435456 bytes of strings in all, at key 'k'")));
  rusage after{};
  getrusage(RUSAGE_SELF, &after);
  EXPECT_LT(1024 * (after.ru_maxrss - before.ru_maxrss), kBytesMax);
}

// A file that is cut and rewritten while it is read gives DATA_LOSS or the right values.
TEST(HostileBytesTest, AFileThatChangesIsNeverMixed) {
  const TempDir dir;
  const TinyModel model({.vocab = 4096});
  model.WriteHf(dir / "tiny");
  const std::string path = dir / "tiny/model.safetensors";
  const std::string good = ReadAll(path);
  const std::vector<float>& expected = model.tensor("model.embed_tokens.weight").values;
  const auto checkpoint = Checkpoint::Open(dir / "tiny");
  ASSERT_OK(checkpoint);
  std::atomic<bool> is_done = false;
  std::thread writer([&] {
    while (!is_done) {
      std::filesystem::resize_file(path, good.size() / 2);
      testing::WriteFile(path, good);
    }
  });
  int n_lost = 0;
  for (int i = 0; i < 200; ++i) {
    const absl::StatusOr<Matrix> read = (*checkpoint)->Read(kEmbeddingTensor);
    if (read.ok()) {
      EXPECT_TRUE(std::equal(expected.begin(), expected.end(), read->data()));
    } else {
      EXPECT_EQ(read.status().code(), absl::StatusCode::kDataLoss) << read.status();
      ++n_lost;
    }
    std::vector<float> stored(expected.size());
    const absl::Status status =
        (*checkpoint)
            ->ReadStored(kEmbeddingTensor, 0, 4096, std::as_writable_bytes(std::span(stored)));
    if (status.ok()) {
      EXPECT_EQ(stored, expected);
    } else {
      EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
    }
  }
  is_done = true;
  writer.join();
  EXPECT_GT(n_lost, 0);
}

// What malloc and free leave behind (glibc fills both with a pattern here) is nowhere in the file.
TEST(HostileBytesTest, NothingOfTheHeapIsWritten) {
  constexpr int kPattern = 0xa5;  // freed memory; fresh memory gets its complement
  mallopt(M_PERTURB, kPattern);
  const TempDir dir;
  {
    const auto writer = SafetensorsWriter::Create(dir / "w.safetensors", 4096);
    ASSERT_OK(writer);
    const std::vector<std::byte> zeros(1000);
    for (const char* name : {"a", "b", "c"}) {
      (*writer)->Begin(name, "U8", {1000});
      ASSERT_OK((*writer)->Append(zeros));
    }
    ASSERT_OK((*writer)->Finish());
  }
  mallopt(M_PERTURB, 0);
  const std::string bytes = ReadAll(dir / "w.safetensors");
  ASSERT_EQ(bytes.size(), 8u + 4096u + 3000u);
  EXPECT_EQ(bytes.find(std::string(4, '\xa5')), std::string::npos);
  EXPECT_EQ(bytes.find(std::string(4, '\x5a')), std::string::npos);
  const auto file = MemoryFile("w", std::as_bytes(std::span(bytes)));
  EXPECT_OK(ParseSafetensors(*file));
}

}  // namespace
}  // namespace walsh
