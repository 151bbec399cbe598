#include "common/sha256.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <functional>
#include <new>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "common/check.h"
#include "common/out_of_memory.h"
#include "common/publish.h"
#include "common/status_macros.h"

namespace walsh {

struct Sha256::Context {
  EVP_MD_CTX* evp = EVP_MD_CTX_new();
  ~Context() { EVP_MD_CTX_free(evp); }
};

Sha256::Sha256() : context_(std::make_unique<Context>()) {
  WALSH_CHECK(context_->evp != nullptr);
  WALSH_CHECK_EQ(EVP_DigestInit_ex(context_->evp, EVP_sha256(), nullptr), 1);
}
Sha256::~Sha256() = default;
Sha256::Sha256(Sha256&&) noexcept = default;
Sha256& Sha256::operator=(Sha256&&) noexcept = default;

void Sha256::Update(const void* data, size_t n_bytes) {
  WALSH_CHECK_EQ(EVP_DigestUpdate(context_->evp, data, n_bytes), 1);
}

std::string Sha256::HexDigest() {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned n_bytes = 0;
  WALSH_CHECK_EQ(EVP_DigestFinal_ex(context_->evp, digest, &n_bytes), 1);
  static constexpr char kHex[] = "0123456789abcdef";
  std::string hex;
  hex.reserve(2 * n_bytes);
  for (unsigned i = 0; i < n_bytes; ++i) {
    hex.push_back(kHex[digest[i] >> 4]);
    hex.push_back(kHex[digest[i] & 15]);
  }
  return hex;
}

std::string Sha256Hex(std::string_view data) {
  Sha256 hash;
  hash.Update(data);
  return hash.HexDigest();
}

namespace {

absl::StatusOr<std::string> HashRange(int fd, int64_t begin, int64_t end) {
  constexpr int64_t kBufferBytes = 1 << 20;
  std::string buffer(static_cast<size_t>(std::min(kBufferBytes, end - begin)), '\0');
  Sha256 hash;
  while (begin < end) {
    const auto want = static_cast<size_t>(std::min(kBufferBytes, end - begin));
    const ssize_t n = pread(fd, buffer.data(), want, begin);
    if (n < 0) {
      if (errno == EINTR) continue;
      return ErrnoStatus(errno, "reading a file to hash");
    }
    if (n == 0) return absl::DataLossError("the file became shorter while it was hashed");
    hash.Update(buffer.data(), static_cast<size_t>(n));
    begin += n;
  }
  return hash.HexDigest();
}

// Threads that are waited for, also where what the caller does beside them throws.
class Helpers {
 public:
  // `stop` lets them end early. Called when nobody needs more of them.
  explicit Helpers(std::function<void()> stop) : stop_(std::move(stop)) {}
  ~Helpers() {
    stop_();
    for (std::thread& thread : threads_) thread.join();
  }
  Helpers(const Helpers&) = delete;
  Helpers& operator=(const Helpers&) = delete;
  void Start(std::function<void()> work) { threads_.emplace_back(std::move(work)); }

 private:
  const std::function<void()> stop_;
  std::vector<std::thread> threads_;
};

// Closes a file at the end of its scope.
class FileCloser {
 public:
  explicit FileCloser(int fd) : fd_(fd) {}
  ~FileCloser() { close(fd_); }
  FileCloser(const FileCloser&) = delete;
  FileCloser& operator=(const FileCloser&) = delete;

 private:
  const int fd_;
};

absl::StatusOr<std::vector<std::string>> HashChunks(int fd, int n_threads,
                                                    const KeepGoing& keep_going) {
  struct stat info {};
  if (fstat(fd, &info) != 0) return ErrnoStatus(errno, "reading the size of a file to hash");
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError("not a regular file");
  const int64_t n_bytes = info.st_size;
  const int64_t n_chunks = (n_bytes + kHashChunkBytes - 1) / kHashChunkBytes;
  std::vector<std::string> digests(static_cast<size_t>(n_chunks));
  std::atomic<int64_t> next{0};
  absl::Mutex mu;
  absl::Status first_error;
  const auto hash = [&](int64_t i, const KeepGoing& may_go_on) -> absl::StatusOr<std::string> {
    WALSH_RETURN_IF_ERROR(Ask(may_go_on));
    try {
      return HashRange(fd, i * kHashChunkBytes, std::min(n_bytes, (i + 1) * kHashChunkBytes));
    } catch (const std::bad_alloc&) {
      return OutOfMemoryError("no memory left to hash a file");
    }
  };
  const auto work = [&](const KeepGoing& may_go_on) {
    for (int64_t i = next++; i < n_chunks; i = next++) {
      absl::StatusOr<std::string> digest = hash(i, may_go_on);
      if (digest.ok()) {
        digests[static_cast<size_t>(i)] = *std::move(digest);
      } else {
        absl::MutexLock lock(&mu);
        first_error.Update(digest.status());
        next = n_chunks;  // the others stop too
      }
    }
  };
  {
    Helpers helpers([&] { next = n_chunks; });
    for (int64_t i = 1; i < std::min<int64_t>(n_threads, n_chunks); ++i) {
      helpers.Start([&] { work(KeepGoing()); });
    }
    work(keep_going);
  }
  if (!first_error.ok()) return first_error;
  return digests;
}

}  // namespace

absl::StatusOr<std::vector<std::string>> Sha256FileChunks(const std::string& path, int n_threads,
                                                          const KeepGoing& keep_going) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return ErrnoStatus(errno, "opening a file to hash");
  const FileCloser closer(fd);
  return HashChunks(fd, n_threads, keep_going);
}

}  // namespace walsh
