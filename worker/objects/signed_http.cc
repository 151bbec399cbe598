#include "worker/objects/signed_http.h"

#include <curl/curl.h>

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/sha256.h"

namespace walsh::objects {
namespace {

// Slower than this for the time of a stall.
constexpr long kStallBytesPerSecond = 1024;
// Beside the data, errors must fit.
constexpr int64_t kErrorBytesMax = 64 << 10;
constexpr size_t kEtagBytesMax = 256;
constexpr size_t kUrlBytesMax = 64 << 10;
constexpr std::string_view kEtagHeader = "etag:";

void InitializeCurl() {
  static const CURLcode code = curl_global_init(CURL_GLOBAL_DEFAULT);
  WALSH_CHECK(code == CURLE_OK);
}

absl::Status Stopping() { return absl::CancelledError("the worker is stopping"); }

absl::Status CurlStatus(CURLcode code) {
  const std::string message = absl::StrCat("the object store: ", curl_easy_strerror(code));
  switch (code) {
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_RESOLVE_PROXY:
    case CURLE_COULDNT_CONNECT:
    case CURLE_PARTIAL_FILE:
    case CURLE_OPERATION_TIMEDOUT:
    case CURLE_SSL_CONNECT_ERROR:
    case CURLE_GOT_NOTHING:
    case CURLE_SEND_ERROR:
    case CURLE_RECV_ERROR:
    case CURLE_WEIRD_SERVER_REPLY:
    case CURLE_HTTP2:
    case CURLE_HTTP2_STREAM:
      return absl::UnavailableError(message);
    case CURLE_PEER_FAILED_VERIFICATION:
    case CURLE_SSL_CACERT_BADFILE:
      return absl::FailedPreconditionError(message);
    case CURLE_OUT_OF_MEMORY:
      return absl::ResourceExhaustedError(message);
    default:
      return absl::InternalError(message);
  }
}

}  // namespace

struct SignedHttp::Handle {
  Handle() : curl(curl_easy_init()) { WALSH_CHECK(curl != nullptr); }
  ~Handle() { curl_easy_cleanup(curl); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  CURL* const curl;
};

// What libcurl's callbacks see of a request.
class SignedHttp::Transfer {
 public:
  Transfer(const Request& request, const std::atomic<bool>* is_stopped)
      : request_(request), is_stopped_(is_stopped) {}
  ~Transfer() { curl_slist_free_all(headers_); }
  Transfer(const Transfer&) = delete;
  Transfer& operator=(const Transfer&) = delete;

  void AddHeader(const std::string& header) {
    curl_slist* const longer = curl_slist_append(headers_, header.c_str());
    WALSH_CHECK(longer != nullptr);
    headers_ = longer;
  }

  absl::StatusOr<Answer> Perform(CURL* curl) {
    const auto set = [curl](CURLoption option, auto value) {
      const CURLcode code = curl_easy_setopt(curl, option, value);
      WALSH_CHECK(code == CURLE_OK);
    };
    set(CURLOPT_HTTPHEADER, headers_);
    set(CURLOPT_WRITEFUNCTION, &Transfer::OnBody);
    set(CURLOPT_WRITEDATA, this);
    set(CURLOPT_HEADERFUNCTION, &Transfer::OnHeader);
    set(CURLOPT_HEADERDATA, this);
    set(CURLOPT_XFERINFOFUNCTION, &Transfer::OnProgress);
    set(CURLOPT_XFERINFODATA, this);
    set(CURLOPT_NOPROGRESS, 0L);
    const CURLcode code = curl_easy_perform(curl);
    if (code == CURLE_ABORTED_BY_CALLBACK) return stop_;
    if (code == CURLE_WRITE_ERROR) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the object store's answer has more than ", bytes_max(), " bytes"));
    }
    if (code != CURLE_OK) return CurlStatus(code);
    long status = 0;
    curl_easy_getinfo(curl, CURLINFO_RESPONSE_CODE, &status);
    answer_.status = static_cast<int>(status);
    return std::move(answer_);
  }

 private:
  int64_t bytes_max() const { return std::max(request_.answer_bytes_max, kErrorBytesMax); }

  // As libcurl wants it: anything but the number of bytes ends the transfer.
  static size_t OnBody(char* data, size_t, size_t n_bytes, void* self) {
    Transfer& transfer = *static_cast<Transfer*>(self);
    std::string& body = transfer.answer_.body;
    if (static_cast<int64_t>(body.size() + n_bytes) > transfer.bytes_max()) return 0;
    body.append(data, n_bytes);
    return n_bytes;
  }

  static size_t OnHeader(char* data, size_t, size_t n_bytes, void* self) {
    const absl::string_view line(data, n_bytes);
    if (absl::StartsWithIgnoreCase(line,
                                   absl::string_view(kEtagHeader.data(), kEtagHeader.size()))) {
      const absl::string_view value = absl::StripAsciiWhitespace(line.substr(kEtagHeader.size()));
      if (value.size() <= kEtagBytesMax) {
        static_cast<Transfer*>(self)->answer_.etag = std::string(value);
      }
    }
    return n_bytes;
  }

  static int OnProgress(void* self, curl_off_t, curl_off_t, curl_off_t, curl_off_t) {
    Transfer& transfer = *static_cast<Transfer*>(self);
    transfer.stop_ = *transfer.is_stopped_ ? Stopping() : Ask(transfer.request_.keep_going);
    return transfer.stop_.ok() ? 0 : 1;
  }

  const Request& request_;
  const std::atomic<bool>* const is_stopped_;
  absl::Status stop_;  // why the transfer was ended
  curl_slist* headers_ = nullptr;
  Answer answer_;
};

SignedHttp::SignedHttp(S3Options options) : options_(std::move(options)) { InitializeCurl(); }
SignedHttp::~SignedHttp() = default;

std::unique_ptr<SignedHttp::Handle> SignedHttp::TakeHandle() const {
  const std::lock_guard lock(mu_);
  if (idle_.empty()) return std::make_unique<Handle>();
  std::unique_ptr<Handle> handle = std::move(idle_.back());
  idle_.pop_back();
  return handle;
}

absl::StatusOr<SignedHttp::Answer> SignedHttp::Send(const Request& request,
                                                    absl::Duration timeout) const {
  if (is_stopped_) return Stopping();
  const std::string url = absl::StrCat(options_.endpoint, request.path_and_query);
  if (url.size() > kUrlBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("an object's address has ", url.size(),
                                                   " bytes, at most ", kUrlBytesMax, " are sent"));
  }
  std::unique_ptr<Handle> handle = TakeHandle();
  CURL* const curl = handle->curl;
  curl_easy_reset(curl);  // keeps its connection
  const auto set = [curl](CURLoption option, auto value) {
    const CURLcode code = curl_easy_setopt(curl, option, value);
    WALSH_CHECK(code == CURLE_OK);
  };
  set(CURLOPT_NOSIGNAL, 1L);
  set(CURLOPT_PROTOCOLS_STR, "http,https");
  set(CURLOPT_FOLLOWLOCATION, 0L);
  set(CURLOPT_URL, url.c_str());
  set(CURLOPT_PATH_AS_IS, 1L);
  set(CURLOPT_CONNECTTIMEOUT_MS,
      static_cast<long>(absl::ToInt64Milliseconds(options_.connect_timeout)));
  set(CURLOPT_TIMEOUT_MS,
      static_cast<long>(std::max<int64_t>(1, absl::ToInt64Milliseconds(timeout))));
  set(CURLOPT_LOW_SPEED_LIMIT, kStallBytesPerSecond);
  set(CURLOPT_LOW_SPEED_TIME,
      static_cast<long>(std::max<int64_t>(1, absl::ToInt64Seconds(options_.stall_timeout))));
  set(CURLOPT_AWS_SIGV4, absl::StrCat("aws:amz:", options_.region, ":s3").c_str());
  set(CURLOPT_USERNAME, options_.access_key_id.c_str());
  set(CURLOPT_PASSWORD, options_.secret_access_key.c_str());
  if (request.method == "PUT" || request.method == "POST") {
    set(CURLOPT_POSTFIELDSIZE_LARGE, static_cast<curl_off_t>(request.body.size()));
    set(CURLOPT_POSTFIELDS, request.body.empty() ? "" : request.body.data());
  }
  set(CURLOPT_CUSTOMREQUEST, request.method.c_str());

  Transfer transfer(request, &is_stopped_);
  // libcurl 7.88 takes the digest of its signature from this header, and sends none by itself.
  transfer.AddHeader(absl::StrCat("x-amz-content-sha256: ", Sha256Hex(request.body)));
  if (!options_.session_token.empty()) {
    transfer.AddHeader(absl::StrCat("x-amz-security-token: ", options_.session_token));
  }
  transfer.AddHeader("Content-Type: application/octet-stream");
  for (const std::string& header : request.headers) transfer.AddHeader(header);
  absl::StatusOr<Answer> answer = transfer.Perform(curl);
  const std::lock_guard lock(mu_);
  idle_.push_back(std::move(handle));
  return answer;
}

}  // namespace walsh::objects
