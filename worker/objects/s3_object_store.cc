#include "worker/objects/s3_object_store.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <functional>
#include <mutex>
#include <random>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "worker/io/random_access_file.h"
#include "worker/objects/object_metrics.h"
#include "worker/objects/signed_http.h"
#include "worker/objects/xml.h"

namespace walsh::objects {
namespace {

using Request = SignedHttp::Request;
using Answer = SignedHttp::Answer;

constexpr absl::Duration kRetryMax = absl::Seconds(5);
// How often a pause asks whether it is still worth its time.
constexpr absl::Duration kAskInterval = absl::Milliseconds(100);
// S3's own ceiling.
constexpr int64_t kPartsMax = 10'000;
// A page has 1,000 keys of at most 1 KiB.
constexpr int64_t kPageBytesMax = 4 << 20;
constexpr int64_t kDocumentBytesMax = 64 << 10;
constexpr size_t kListedMax = 100'000;
constexpr int kPagesMax = 1000;
constexpr size_t kTokenBytesMax = 8192;
constexpr size_t kCodeCharsMax = 64;
constexpr size_t kEtagBytesMax = 256;

// As AWS signature version 4 wants paths and parameters.
std::string UriEncode(std::string_view text, bool is_path) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    const bool is_plain = std::isalnum(byte) != 0 || c == '-' || c == '.' || c == '_' || c == '~';
    if (is_plain || (is_path && c == '/')) {
      out += c;
    } else {
      absl::StrAppendFormat(&out, "%%%02X", byte);
    }
  }
  return out;
}

// The name of an error that S3 tells, as far as it can be one.
std::string ErrorCode(const Answer& answer) {
  std::string code = XmlText(answer.body, "Code").value_or("").substr(0, kCodeCharsMax);
  std::erase_if(code, [](unsigned char c) { return std::isalnum(c) == 0; });
  return code;
}

absl::StatusCode StatusCodeOf(int http_status, std::string_view code) {
  if (code == "QuotaExceeded" || code == "XMinioStorageFull") {
    return absl::StatusCode::kResourceExhausted;
  }
  if (code == "BadDigest" || code == "XAmzContentSHA256Mismatch")
    return absl::StatusCode::kDataLoss;
  if (code == "RequestTimeout" || code == "SlowDown") return absl::StatusCode::kUnavailable;
  switch (http_status) {
    case 400:
      return absl::StatusCode::kInvalidArgument;
    case 401:
    case 403:
      return absl::StatusCode::kPermissionDenied;
    case 404:
      return absl::StatusCode::kNotFound;
    case 409:  // two conditional writes met, of which one of ours may be both
      return absl::StatusCode::kUnavailable;
    case 412:
      return absl::StatusCode::kAborted;
    case 416:
      return absl::StatusCode::kDataLoss;
    case 429:
      return absl::StatusCode::kUnavailable;
    case 501:
      return absl::StatusCode::kUnimplemented;
    case 507:
      return absl::StatusCode::kResourceExhausted;
    default:
      return http_status >= 500 ? absl::StatusCode::kUnavailable
                                : absl::StatusCode::kFailedPrecondition;
  }
}

absl::Status StatusOf(const Answer& answer) {
  // The end of an upload in parts may fail after its 200 was sent.
  const bool is_late_error =
      answer.status == 200 && answer.body.find("<Error>") != std::string::npos;
  if (answer.status >= 200 && answer.status < 300 && !is_late_error) return absl::OkStatus();
  const std::string code = ErrorCode(answer);
  return absl::Status(StatusCodeOf(is_late_error ? 500 : answer.status, code),
                      absl::StrCat("the object store answered ", answer.status,
                                   code.empty() ? "" : absl::StrCat(" (", code, ")")));
}

// What may be sent back in a header.
bool IsEtag(const std::string& text) {
  return text.size() <= kEtagBytesMax &&
         std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c < 0x7f; });
}

// Gives bytes [offset, offset + n) of what is written, valid until the next call.
using Source = std::function<absl::StatusOr<std::string_view>(int64_t offset, int64_t n)>;

class S3Store final : public ObjectStore {
 public:
  explicit S3Store(S3Options options) : options_(std::move(options)), http_(options_) {}

  absl::StatusOr<Contents> Get(const std::string& key, int64_t bytes_max,
                               const KeepGoing& keep_going) const override {
    WALSH_ASSIGN_OR_RETURN(const std::string path, PathOf(key));
    WALSH_ASSIGN_OR_RETURN(Answer answer, Send({.method = "GET",
                                                .path_and_query = path,
                                                .answer_bytes_max = bytes_max,
                                                .keep_going = keep_going}));
    if (static_cast<int64_t>(answer.body.size()) > bytes_max) {
      return absl::ResourceExhaustedError(
          absl::StrCat("a stored object has more than ", bytes_max, " bytes"));
    }
    return Contents{.bytes = std::move(answer.body), .version = std::move(answer.etag)};
  }

  absl::Status ReadAt(const std::string& key, int64_t offset, std::span<std::byte> into,
                      const ReadOptions& options) const override {
    if (into.empty()) return absl::OkStatus();
    WALSH_ASSIGN_OR_RETURN(const std::string path, PathOf(key));
    const auto n_bytes = static_cast<int64_t>(into.size());
    std::vector<std::string> headers = {
        absl::StrCat("Range: bytes=", offset, "-", offset + n_bytes - 1)};
    if (!options.must_have_etag.empty()) {
      headers.push_back(absl::StrCat("If-Match: ", options.must_have_etag));
    }
    WALSH_ASSIGN_OR_RETURN(const Answer answer, Send({.method = "GET",
                                                      .path_and_query = path,
                                                      .headers = std::move(headers),
                                                      .answer_bytes_max = n_bytes,
                                                      .keep_going = options.keep_going}));
    // Not every endpoint knows If-Match of a GET.
    if (!options.must_have_etag.empty() && !answer.etag.empty() &&
        answer.etag != options.must_have_etag) {
      return absl::AbortedError("a stored object is not what the read expects");
    }
    if (answer.status != 206 || answer.body.size() != into.size()) {
      return absl::DataLossError("a stored object is shorter than it should be");
    }
    std::memcpy(into.data(), answer.body.data(), into.size());
    return absl::OkStatus();
  }

  absl::StatusOr<std::string> Put(const std::string& key, std::string_view contents,
                                  const WriteCondition& condition) override {
    const auto n_bytes = static_cast<int64_t>(contents.size());
    if (condition.must_be_absent) return PutOnce(key, contents, {"If-None-Match: *"});
    if (!condition.must_be_version.empty()) {
      return PutOnce(key, contents, {absl::StrCat("If-Match: ", condition.must_be_version)});
    }
    if (n_bytes <= options_.part_bytes) return PutOnce(key, contents, {});
    const Source source = [&](int64_t offset, int64_t n) {
      return contents.substr(static_cast<size_t>(offset), static_cast<size_t>(n));
    };
    return PutParts(key, n_bytes, source);
  }

  absl::Status PutFile(const std::string& key, const std::string& path, const std::string& sha256,
                       const KeepGoing& keep_going) override {
    WALSH_ASSIGN_OR_RETURN(const auto file, OpenRandomAccessFile(path));
    std::string buffer;
    Sha256 hash;
    const Source source = [&](int64_t offset, int64_t n) -> absl::StatusOr<std::string_view> {
      WALSH_RETURN_IF_ERROR(Ask(keep_going));
      buffer.resize(static_cast<size_t>(n));
      WALSH_RETURN_IF_ERROR(file->ReadAt(offset, std::as_writable_bytes(std::span(buffer))));
      hash.Update(buffer);
      if (offset + n == file->size() && hash.HexDigest() != sha256) {
        return absl::DataLossError(absl::StrCat(file->name(), " differs from its digest"));
      }
      return buffer;
    };
    if (file->size() > options_.part_bytes) return PutParts(key, file->size(), source).status();
    WALSH_ASSIGN_OR_RETURN(const std::string_view contents, source(0, file->size()));
    return PutOnce(key, contents, {}).status();
  }

  absl::StatusOr<std::vector<Listed>> List(const std::string& folder,
                                           const KeepGoing& keep_going) const override {
    WALSH_RETURN_IF_ERROR(CheckKey(folder));
    const std::string prefix = FullKey(folder) + "/";
    std::vector<Listed> listed;
    std::string token;
    for (int n_pages = 0; n_pages < kPagesMax; ++n_pages) {
      // Parameters in the order of their names, as the signature wants them.
      WALSH_ASSIGN_OR_RETURN(
          const Answer page,
          SendList(
              absl::StrCat(token.empty()
                               ? ""
                               : absl::StrCat("continuation-token=", UriEncode(token, false), "&"),
                           "list-type=2&prefix=", UriEncode(prefix, false)),
              keep_going));
      WALSH_RETURN_IF_ERROR(ReadPage(page.body, prefix, listed));
      if (XmlText(page.body, "IsTruncated") != "true") return listed;
      const std::string next = XmlText(page.body, "NextContinuationToken").value_or("");
      if (next.empty() || next == token || next.size() > kTokenBytesMax) {
        return absl::DataLossError("the object store's list has no next page");
      }
      token = next;
    }
    return absl::DataLossError(
        absl::StrCat("the object store's list has more than ", kPagesMax, " pages"));
  }

  absl::StatusOr<Listed> Find(const std::string& key, const KeepGoing& keep_going) const override {
    WALSH_RETURN_IF_ERROR(CheckKey(key));
    // Of all keys that begin like it, it is the first. A HEAD would say 403 of one that is missing
    // to who may not list, and has no body to tell why.
    WALSH_ASSIGN_OR_RETURN(
        const Answer page,
        SendList(absl::StrCat("list-type=2&max-keys=1&prefix=", UriEncode(FullKey(key), false)),
                 keep_going));
    std::vector<Listed> listed;
    WALSH_RETURN_IF_ERROR(ReadPage(page.body, FullKey(key), listed));
    if (listed.empty() || listed.front().key != key) {
      return absl::NotFoundError("no such stored object");
    }
    return std::move(listed.front());
  }

  absl::Status Delete(const std::string& key) override {
    WALSH_ASSIGN_OR_RETURN(const std::string path, PathOf(key));
    const absl::Status status = Send({.method = "DELETE", .path_and_query = path}).status();
    return absl::IsNotFound(status) ? absl::OkStatus() : status;
  }

  void Stop() override {
    http_.Stop();
    const std::lock_guard lock(stop_mu_);
    if (!stopped_.HasBeenNotified()) stopped_.Notify();
  }

 private:
  std::string FullKey(const std::string& key) const {
    return options_.prefix.empty() ? key : absl::StrCat(options_.prefix, "/", key);
  }
  absl::StatusOr<std::string> PathOf(const std::string& key) const {
    WALSH_RETURN_IF_ERROR(CheckKey(key));
    return absl::StrCat("/", options_.bucket, "/", UriEncode(FullKey(key), /*is_path=*/true));
  }

  absl::StatusOr<Answer> SendList(const std::string& query, const KeepGoing& keep_going) const {
    return Send({.method = "GET",
                 .path_and_query = absl::StrCat("/", options_.bucket, "?", query),
                 .answer_bytes_max = kPageBytesMax,
                 .keep_going = keep_going});
  }

  // An answer of success.
  absl::StatusOr<Answer> Send(const Request& request) const {
    thread_local std::minstd_rand random{std::random_device{}()};
    std::uniform_real_distribution<double> jitter(0.75, 1.25);
    const absl::Time deadline = absl::Now() + options_.deadline;
    for (absl::Duration pause = options_.retry_first;; pause = std::min(pause * 2, kRetryMax)) {
      const absl::Time start = absl::Now();
      absl::StatusOr<Answer> answer = http_.Send(request, deadline - start);
      const absl::Status status = answer.ok() ? StatusOf(*answer) : answer.status();
      ObserveRequest(request.method, status.code(), absl::Now() - start,
                     static_cast<int64_t>(request.body.size()),
                     answer.ok() ? static_cast<int64_t>(answer->body.size()) : 0);
      if (status.ok()) return answer;
      const absl::Duration wait = pause * jitter(random);
      if (!absl::IsUnavailable(status) || absl::Now() + wait >= deadline) return status;
      WALSH_RETURN_IF_ERROR(Ask(request.keep_going));
      if (!Pause(wait, request.keep_going)) return status;
    }
  }

  // False: stopped meanwhile. What `keep_going` says ends the pause, and is asked again afterwards.
  bool Pause(absl::Duration wait, const KeepGoing& keep_going) const {
    const absl::Time until = absl::Now() + wait;
    for (absl::Time now = absl::Now(); now < until && Ask(keep_going).ok(); now = absl::Now()) {
      if (stopped_.WaitForNotificationWithTimeout(std::min(until - now, kAskInterval))) {
        return false;
      }
    }
    return true;
  }

  absl::StatusOr<std::string> PutOnce(const std::string& key, std::string_view contents,
                                      std::vector<std::string> headers) const {
    WALSH_ASSIGN_OR_RETURN(const std::string path, PathOf(key));
    WALSH_ASSIGN_OR_RETURN(Answer answer, Send({.method = "PUT",
                                                .path_and_query = path,
                                                .headers = std::move(headers),
                                                .body = contents}));
    return std::move(answer.etag);
  }

  absl::StatusOr<std::string> PutParts(const std::string& key, int64_t n_bytes,
                                       const Source& source) const {
    WALSH_ASSIGN_OR_RETURN(const std::string path, PathOf(key));
    WALSH_ASSIGN_OR_RETURN(const Answer begun, Send({.method = "POST",
                                                     .path_and_query = path + "?uploads=",
                                                     .answer_bytes_max = kDocumentBytesMax}));
    const std::string id = UriEncode(XmlText(begun.body, "UploadId").value_or(""), false);
    if (id.empty()) return absl::DataLossError("the object store began an upload without its id");
    absl::StatusOr<std::string> version = PutPartsOf(path, id, n_bytes, source);
    if (!version.ok()) {
      // Whatever this says, the upload has failed for a reason of its own.
      Send({.method = "DELETE", .path_and_query = absl::StrCat(path, "?uploadId=", id)})
          .status()
          .IgnoreError();
    }
    return version;
  }

  absl::StatusOr<std::string> PutPartsOf(const std::string& path, const std::string& id,
                                         int64_t n_bytes, const Source& source) const {
    const int64_t part_bytes = std::max(options_.part_bytes, (n_bytes + kPartsMax - 1) / kPartsMax);
    std::string parts;
    int number = 0;
    for (int64_t offset = 0; offset < n_bytes; offset += part_bytes) {
      WALSH_ASSIGN_OR_RETURN(const std::string_view part,
                             source(offset, std::min(part_bytes, n_bytes - offset)));
      ++number;
      WALSH_ASSIGN_OR_RETURN(
          const Answer answer,
          Send({.method = "PUT",
                .path_and_query = absl::StrCat(path, "?partNumber=", number, "&uploadId=", id),
                .body = part}));
      absl::StrAppend(&parts, "<Part><PartNumber>", number, "</PartNumber><ETag>",
                      XmlEscape(answer.etag), "</ETag></Part>");
    }
    const std::string document =
        absl::StrCat("<CompleteMultipartUpload>", parts, "</CompleteMultipartUpload>");
    const absl::StatusOr<Answer> ended =
        Send({.method = "POST",
              .path_and_query = absl::StrCat(path, "?uploadId=", id),
              .body = document,
              .answer_bytes_max = kDocumentBytesMax});
    if (absl::IsNotFound(ended.status())) {
      return absl::UnavailableError("the object store does not know an upload any more");
    }
    WALSH_RETURN_IF_ERROR(ended.status());
    return XmlText(ended->body, "ETag").value_or("");
  }

  absl::Status ReadPage(std::string_view page, const std::string& prefix,
                        std::vector<Listed>& listed) const {
    for (const std::string_view entry : XmlElements(page, "Contents")) {
      const std::string key = XmlText(entry, "Key").value_or("");
      Listed object;
      std::string error;
      // What others have put there, and could not be a key of ours, is not ours.
      if (!key.starts_with(prefix)) continue;
      object.key = key.substr(FullKey("").size());
      if (!CheckKey(object.key).ok()) continue;
      if (!absl::SimpleAtoi(XmlText(entry, "Size").value_or(""), &object.size_bytes) ||
          object.size_bytes < 0 ||
          !absl::ParseTime(absl::RFC3339_full, XmlText(entry, "LastModified").value_or(""),
                           &object.modified, &error)) {
        return absl::DataLossError("the object store's list cannot be read");
      }
      object.etag = XmlText(entry, "ETag").value_or("");
      if (!IsEtag(object.etag)) object.etag.clear();
      if (listed.size() == kListedMax) {
        return absl::ResourceExhaustedError(
            absl::StrCat("the object store lists more than ", kListedMax, " objects"));
      }
      listed.push_back(std::move(object));
    }
    return absl::OkStatus();
  }

  const S3Options options_;
  SignedHttp http_;
  mutable absl::Notification stopped_;
  std::mutex stop_mu_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ObjectStore>> OpenS3Store(S3Options options) {
  WALSH_RETURN_IF_ERROR(CheckS3Options(options));
  RegisterObjectMetrics();
  return std::make_unique<S3Store>(std::move(options));
}

}  // namespace walsh::objects
