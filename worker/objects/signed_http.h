// One HTTP request to an S3 endpoint, signed with AWS signature version 4 by libcurl.
//
// The body's digest is part of the signature (x-amz-content-sha256), so that an endpoint stores
// what was meant or refuses it. Only http and https; redirects are answers like any other.
//
// Errors:  UNAVAILABLE        no connection, one that broke, stalled or took too long, a body that
//                             ended early
//          RESOURCE_EXHAUSTED the answer's body is larger than what was expected
//          FAILED_PRECONDITION the endpoint's certificate; CANCELLED after Stop; INTERNAL
// Threads: safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/keep_going.h"
#include "worker/objects/s3_options.h"

namespace walsh::objects {

class SignedHttp {
 public:
  struct Request {
    std::string method;
    // Beneath the endpoint, as it is signed and sent: percent-encoded, the query's parameters
    // sorted and each with its '='.
    std::string path_and_query;
    std::vector<std::string> headers = {};  // "Name: value"
    std::string_view body = {};
    int64_t answer_bytes_max = 0;
    KeepGoing keep_going = {};  // asked about once a second, and what it says returned
  };
  struct Answer {
    int status = 0;
    std::string body;
    std::string etag;
  };

  explicit SignedHttp(S3Options options);
  ~SignedHttp();
  SignedHttp(const SignedHttp&) = delete;
  SignedHttp& operator=(const SignedHttp&) = delete;

  absl::StatusOr<Answer> Send(const Request& request, absl::Duration timeout) const;
  // Requests that run or come later are CANCELLED.
  void Stop() { is_stopped_ = true; }

 private:
  struct Handle;
  class Transfer;
  // One that has a connection, where there is one.
  std::unique_ptr<Handle> TakeHandle() const;

  const S3Options options_;
  std::atomic<bool> is_stopped_ = false;
  mutable std::mutex mu_;
  mutable std::vector<std::unique_ptr<Handle>> idle_;  // guarded by mu_
};

}  // namespace walsh::objects
