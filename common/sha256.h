// SHA-256 through OpenSSL.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "common/keep_going.h"

namespace walsh {

class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(Sha256&&) noexcept;
  Sha256& operator=(Sha256&&) noexcept;
  void Update(const void* data, size_t n_bytes);
  void Update(std::string_view data) { Update(data.data(), data.size()); }
  std::string HexDigest();  // lower case; the object is then finished

 private:
  struct Context;
  std::unique_ptr<Context> context_;
};

std::string Sha256Hex(std::string_view data);

inline constexpr int64_t kHashChunkBytes = 64 << 20;
// The digests of a file's 64 MiB chunks in order, hashed by up to `n_threads` threads. An empty
// file has none. Asks `keep_going` before each chunk that the caller's thread hashes; what that
// throws is thrown on, once no thread reads the file any more.
absl::StatusOr<std::vector<std::string>> Sha256FileChunks(const std::string& path, int n_threads,
                                                          const KeepGoing& keep_going = {});

}  // namespace walsh
