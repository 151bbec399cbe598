// Losses of whole documents against a float64 forward in numpy (the model's reference.json).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "worker/evaluate/perplexity.h"
#include "worker/io/checkpoint.h"
#include "worker/tokenizer/tokenizer.h"

namespace walsh::evaluate {
namespace {

nlohmann::json ReadJson(const std::string& path) {
  std::ifstream file(path);
  return nlohmann::json::parse(file);
}

// Stripped, blank lines collapsed, as the reference was computed.
std::string Clean(const std::string& story) {
  std::string text;
  for (char c : story) {
    if (c == '\n' && (text.empty() || text.back() == '\n')) continue;
    text += c;
  }
  return text.substr(0, text.find_last_not_of(" \n") + 1);
}

TEST(TinyStoriesLossesTest, EqualTheFloat64Reference) {
  WALSH_REQUIRE_DATA(model, "models/TinyStories-656K");
  WALSH_REQUIRE_DATA(corpus, "corpora/tinystories-train-1000.json");
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(model));
  ASSERT_OK_AND_ASSIGN(const auto tokenizer, Tokenizer::Create(checkpoint->tokenizer()));
  const nlohmann::json stories = ReadJson(corpus);
  const nlohmann::json reference =
      ReadJson(model + "/reference.json")["per_doc_nll_sum_and_tokens"];
  CheckpointSource source(*checkpoint);
  ThreadPool pool(2);

  int n_compared = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    const std::string text = Clean(stories[i].get<std::string>());
    ASSERT_OK_AND_ASSIGN(std::vector<int32_t> ids, tokenizer->Encode(text, {}));
    // Characters outside the vocabulary become tokens by rules that differ between programs.
    const auto is_unknown = [](int32_t id) { return id == 0; };
    if (std::any_of(ids.begin(), ids.end(), is_unknown)) continue;
    if (ids.back() != 2) ids.push_back(2);
    const auto expected_tokens = reference[i][1].get<int64_t>();
    ASSERT_EQ(static_cast<int64_t>(ids.size()) - 1, expected_tokens) << "document " << i;
    calibrate::TokenWindows windows;
    windows.length = static_cast<int64_t>(ids.size());
    windows.ids = ids;
    ASSERT_OK_AND_ASSIGN(
        const WindowLosses losses,
        EvaluateWindows(source, windows, pool, [](double) { return absl::OkStatus(); }));
    EXPECT_EQ(losses.n_tokens, expected_tokens);
    EXPECT_NEAR(losses.losses[0] * static_cast<double>(expected_tokens),
                reference[i][0].get<double>(), 1e-3)
        << "document " << i;
    ++n_compared;
  }
  EXPECT_GE(n_compared, 88);
}

}  // namespace
}  // namespace walsh::evaluate
