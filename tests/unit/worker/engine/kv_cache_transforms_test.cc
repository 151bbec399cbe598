#include "worker/engine/kv_cache_transforms.h"

#include <gtest/gtest.h>

namespace walsh::engine {
namespace {

const OnlineTransforms kOfArtifact = {
    .down_input = {.block = 64, .sequency = true},
    .query_key = {.block = 128, .sequency = false},
    .activations = {.bits = 8},
    .kv_cache = {.bits = 2, .group_size = 32, .symmetric = false, .clip_ratio = 0.9}};

TEST(KvCacheTransformsTest, AutoIsWhatTheArtifactSays) {
  EXPECT_EQ(WithKvCache(kOfArtifact, KvCacheDtype::kAuto, {.head_dim = 128}), kOfArtifact);
  EXPECT_TRUE(WithKvCache({}, KvCacheDtype::kAuto, {.head_dim = 128}).empty());
}

TEST(KvCacheTransformsTest, Bf16RoundsNothingAndNeedsNoR3) {
  OnlineTransforms expected = kOfArtifact;
  expected.kv_cache = {};
  expected.query_key = {};
  EXPECT_EQ(WithKvCache(kOfArtifact, KvCacheDtype::kBf16, {.head_dim = 128}), expected);
}

TEST(KvCacheTransformsTest, CodesHaveAGridForEachHeadAndR3WhereTheWidthHasOne) {
  const OnlineTransforms int8 = WithKvCache({}, KvCacheDtype::kInt8, {.head_dim = 128});
  EXPECT_EQ(int8, (OnlineTransforms{.query_key = {.block = 128, .sequency = true},
                                    .kv_cache = {.bits = 8, .group_size = 128, .clip_ratio = 1}}));
  const OnlineTransforms int4 = WithKvCache({}, KvCacheDtype::kInt4, {.head_dim = 96});
  EXPECT_EQ(int4,
            (OnlineTransforms{.kv_cache = {.bits = 4, .group_size = 96, .clip_ratio = 0.95}}));
}

TEST(KvCacheTransformsTest, OtherTransformsOfTheArtifactStay) {
  OnlineTransforms expected = kOfArtifact;
  expected.kv_cache = {.bits = 4, .group_size = 128, .clip_ratio = 0.95};
  EXPECT_EQ(WithKvCache(kOfArtifact, KvCacheDtype::kInt4, {.head_dim = 128}), expected);
}

}  // namespace
}  // namespace walsh::engine
