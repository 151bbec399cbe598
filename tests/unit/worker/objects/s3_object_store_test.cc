// Goal:   the S3 store signs what it sends, and lives with answers that a good server never gives.
// Method: scripted answers on the loopback; signatures computed once more from the specification
//         (AWS signature version 4), beside libcurl's. A real server: tests/integration/s3_test.cc.
#include "worker/objects/s3_object_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "common/publish.h"
#include "common/sha256.h"
#include "tests/testing/metric_value.h"
#include "tests/testing/scoped_environment.h"
#include "tests/testing/scripted_http_server.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/testing/wait.h"

namespace walsh::objects {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;
using ::testing::StartsWith;
using ::walsh::testing::HasCode;
using ::walsh::testing::MetricValue;
using ::walsh::testing::ScopedEnvironment;
using ::walsh::testing::ScriptedHttpServer;
using ::walsh::testing::StatusIs;

constexpr char kSecret[] = "a/secret+key";

struct SentRequest {
  std::string method, target;
  std::map<std::string, std::string> headers;  // by name in small letters
  std::string body;
};

SentRequest Parse(const std::string& text) {
  SentRequest request;
  const size_t head = text.find("\r\n\r\n");
  request.body = text.substr(head + 4);
  const std::vector<std::string> lines = absl::StrSplit(text.substr(0, head), "\r\n");
  const std::vector<std::string> first = absl::StrSplit(lines[0], ' ');
  request.method = first[0];
  request.target = first[1];
  for (size_t i = 1; i < lines.size(); ++i) {
    const size_t colon = lines[i].find(':');
    request.headers[absl::AsciiStrToLower(lines[i].substr(0, colon))] =
        std::string(absl::StripAsciiWhitespace(lines[i].substr(colon + 1)));
  }
  return request;
}

std::string Hmac(const std::string& key, const std::string& text) {
  std::string out(EVP_MAX_MD_SIZE, '\0');
  unsigned int size = 0;
  HMAC(EVP_sha256(), key.data(), static_cast<int>(key.size()),
       reinterpret_cast<const unsigned char*>(text.data()), text.size(),
       reinterpret_cast<unsigned char*>(out.data()), &size);
  out.resize(size);
  return out;
}

// The Authorization header that the request should have.
std::string Authorization(const SentRequest& request, const std::string& region) {
  std::vector<std::string> names;
  std::string canonical_headers;
  for (const auto& [name, value] : request.headers) {
    if (name != "host" && name != "content-type" && name != "range" &&
        !name.starts_with("x-amz-") && !name.starts_with("if-")) {
      continue;
    }
    names.push_back(name);
    absl::StrAppend(&canonical_headers, name, ":", value, "\n");
  }
  const std::string signed_names = absl::StrJoin(names, ";");
  const std::pair<std::string, std::string> target =
      absl::StrSplit(request.target, absl::MaxSplits('?', 1));
  const std::string canonical =
      absl::StrJoin({request.method, target.first, target.second, canonical_headers, signed_names,
                     Sha256Hex(request.body)},
                    "\n");
  const std::string date = request.headers.at("x-amz-date");
  const std::string scope = absl::StrCat(date.substr(0, 8), "/", region, "/s3/aws4_request");
  std::string key = absl::StrCat("AWS4", kSecret);
  for (const std::string& part :
       {date.substr(0, 8), region, std::string("s3"), std::string("aws4_request")}) {
    key = Hmac(key, part);
  }
  const std::string signature = absl::BytesToHexString(Hmac(
      key,
      absl::StrJoin({std::string("AWS4-HMAC-SHA256"), date, scope, Sha256Hex(canonical)}, "\n")));
  return absl::StrCat("AWS4-HMAC-SHA256 Credential=an-id/", scope, ", SignedHeaders=", signed_names,
                      ", Signature=", signature);
}

class S3ObjectStoreTest : public ::testing::Test {
 protected:
  void Answer(std::vector<std::string> answers) {
    server_ = std::make_unique<ScriptedHttpServer>(std::move(answers));
    options_.endpoint = server_->url();
    options_.region = "eu-central-7";
    options_.access_key_id = "an-id";
    options_.secret_access_key = kSecret;
    options_.bucket = "bucket";
    options_.retry_first = absl::Milliseconds(1);
    absl::StatusOr<std::unique_ptr<ObjectStore>> store = OpenS3Store(options_);
    ASSERT_OK(store);
    store_ = *std::move(store);
  }
  static std::string Ok(const std::string& body = "", const std::string& headers = "") {
    return ScriptedHttpServer::Answer(200, body, headers);
  }
  static std::string Error(int status, const std::string& code) {
    return ScriptedHttpServer::Answer(status, "<Error><Code>" + code + "</Code></Error>");
  }
  std::vector<SentRequest> Sent() const {
    std::vector<SentRequest> sent;
    for (const std::string& request : server_->requests()) sent.push_back(Parse(request));
    return sent;
  }
  std::vector<std::string> SentLines() const {
    std::vector<std::string> lines;
    for (const SentRequest& request : Sent()) {
      lines.push_back(request.method + " " + request.target);
    }
    return lines;
  }

  S3Options options_{.deadline = absl::Seconds(20)};
  std::unique_ptr<ScriptedHttpServer> server_;
  std::unique_ptr<ObjectStore> store_;
};

TEST_F(S3ObjectStoreTest, SignsEveryRequest) {
  options_.prefix = "pre/fix";
  options_.session_token = "a-token";
  Answer({Ok("", "ETag: \"1\"\r\n")});
  ASSERT_OK_AND_ASSIGN(const std::string version, store_->Put("a/b_c", "contents"));
  EXPECT_EQ(version, "\"1\"");
  ASSERT_OK(store_->Put("a", "x", {.must_be_absent = true}));
  ASSERT_OK(store_->Put("a", "x", {.must_be_version = version}));
  ASSERT_OK(store_->Get("a", 10));
  ASSERT_OK(store_->List("a"));
  ASSERT_OK(store_->Delete("a"));
  const std::vector<SentRequest> sent = Sent();
  ASSERT_THAT(sent, SizeIs(6));
  for (const SentRequest& request : sent) {
    EXPECT_EQ(request.headers.at("authorization"), Authorization(request, "eu-central-7"))
        << request.method;
    EXPECT_EQ(request.headers.at("x-amz-security-token"), "a-token");
    EXPECT_EQ(request.headers.at("x-amz-content-sha256"), Sha256Hex(request.body));
  }
  EXPECT_THAT(SentLines(), ElementsAre("PUT /bucket/pre/fix/a/b_c", "PUT /bucket/pre/fix/a",
                                       "PUT /bucket/pre/fix/a", "GET /bucket/pre/fix/a",
                                       "GET /bucket?list-type=2&prefix=pre%2Ffix%2Fa%2F",
                                       "DELETE /bucket/pre/fix/a"));
  EXPECT_EQ(sent[0].body, "contents");
  EXPECT_EQ(sent[1].headers.at("if-none-match"), "*");
  EXPECT_EQ(sent[2].headers.at("if-match"), "\"1\"");
}

TEST_F(S3ObjectStoreTest, TriesAgainWhatFailsInPassing) {
  Answer({Error(500, "InternalError"), Error(503, "SlowDown"), Error(429, "TooManyRequests"), "",
          Error(409, "ConditionalRequestConflict"),
          "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort", Error(400, "RequestTimeout"),
          Ok("contents")});
  ASSERT_OK_AND_ASSIGN(const ObjectStore::Contents contents, store_->Get("a", 100));
  EXPECT_EQ(contents.bytes, "contents");
  EXPECT_THAT(Sent(), SizeIs(8));
}

TEST_F(S3ObjectStoreTest, CountsItsRequests) {
  const auto requests = [](const std::string& code) {
    return MetricValue("walsh_object_store_requests_total",
                       {"method=\"GET\"", "code=\"" + code + "\""});
  };
  const auto received = [] {
    return MetricValue("walsh_object_store_bytes_total", {"direction=\"received\""});
  };
  Answer({Error(503, "SlowDown"), Ok("contents")});
  const double n_ok = requests("OK"), n_away = requests("UNAVAILABLE"), n_bytes = received();
  const double n_timed = MetricValue("walsh_object_store_request_seconds_count", {"GET"});
  ASSERT_OK(store_->Get("a", 100));
  EXPECT_EQ(requests("OK"), n_ok + 1);
  EXPECT_EQ(requests("UNAVAILABLE"), n_away + 1);
  EXPECT_GE(received(), n_bytes + 8);
  EXPECT_EQ(MetricValue("walsh_object_store_request_seconds_count", {"GET"}), n_timed + 2);
}

TEST_F(S3ObjectStoreTest, GivesUpAtItsDeadline) {
  options_.deadline = absl::Milliseconds(50);
  Answer({Error(500, "InternalError")});
  EXPECT_THAT(store_->Get("a", 100), HasCode(absl::StatusCode::kUnavailable));
}

TEST_F(S3ObjectStoreTest, TellsErrorsApartAndDoesNotRepeatThem) {
  const std::vector<std::pair<std::string, absl::StatusCode>> answers = {
      {Error(403, "SignatureDoesNotMatch"), absl::StatusCode::kPermissionDenied},
      {Error(404, "NoSuchBucket"), absl::StatusCode::kNotFound},
      {Error(412, "PreconditionFailed"), absl::StatusCode::kAborted},
      {Error(400, "BadDigest"), absl::StatusCode::kDataLoss},
      {Error(400, "InvalidArgument"), absl::StatusCode::kInvalidArgument},
      {Error(403, "QuotaExceeded"), absl::StatusCode::kResourceExhausted},
      {Error(507, "XMinioStorageFull"), absl::StatusCode::kResourceExhausted},
      {Error(501, "NotImplemented"), absl::StatusCode::kUnimplemented},
      {ScriptedHttpServer::Answer(301, "", "Location: http://127.0.0.1:1/\r\n"),
       absl::StatusCode::kFailedPrecondition}};
  for (const auto& [answer, code] : answers) {
    Answer({answer});
    EXPECT_THAT(store_->Put("a", "x", {.must_be_absent = true}), HasCode(code)) << answer;
    EXPECT_THAT(Sent(), SizeIs(1)) << answer;
  }
}

TEST_F(S3ObjectStoreTest, SaysNothingOfSecretsOrOfWhatTheServerMakesUp) {
  Answer({Error(403, "An\r\n&lt;id&gt; \x1b[31m")});
  EXPECT_THAT(store_->Get("a", 10), StatusIs(absl::StatusCode::kPermissionDenied,
                                             "the object store answered 403 (Anid31m)"));
}

TEST_F(S3ObjectStoreTest, ReadsNoMoreThanAnObjectMayHave) {
  // Its length is not told, and there is no end.
  Answer({"HTTP/1.1 200 OK\r\n\r\n" + std::string(200'000, 'x') + ScriptedHttpServer::kHang});
  EXPECT_THAT(store_->Get("a", 100'000), HasCode(absl::StatusCode::kResourceExhausted));
  Answer({Ok("<ListBucketResult>" + std::string(5 << 20, '<'))});
  EXPECT_THAT(store_->List("a"), HasCode(absl::StatusCode::kResourceExhausted));
}

TEST_F(S3ObjectStoreTest, DoesNotWaitForABodyThatStandsStill) {
  options_.deadline = absl::Milliseconds(200);
  Answer({"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nslow" +
          std::string(ScriptedHttpServer::kHang)});
  EXPECT_THAT(store_->Get("a", 100), HasCode(absl::StatusCode::kUnavailable));
}

TEST_F(S3ObjectStoreTest, EndsWhatRunsWhenItIsStopped) {
  Answer({"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nslow" +
          std::string(ScriptedHttpServer::kHang)});
  std::thread stopping([&] {
    EXPECT_TRUE(testing::WaitUntil([&] { return !server_->requests().empty(); }));
    store_->Stop();
  });
  EXPECT_THAT(store_->Get("a", 100), HasCode(absl::StatusCode::kCancelled));
  stopping.join();
  EXPECT_THAT(store_->Get("a", 100), HasCode(absl::StatusCode::kCancelled));
}

std::string Page(const std::string& keys, const std::string& rest) {
  return absl::StrCat(
      "<?xml version=\"1.0\"?><!DOCTYPE l [<!ENTITY e \"eeee\">]><ListBucketResult>", keys, rest,
      "</ListBucketResult>");
}
std::string Entry(const std::string& key, const std::string& etag = "") {
  return absl::StrCat("<Contents><Key>", key,
                      "</Key><LastModified>2026-01-02T03:04:05.678Z</LastModified><ETag>", etag,
                      "</ETag><Size>12</Size></Contents>");
}

// A transfer that stands still, and pauses between tries.
TEST_F(S3ObjectStoreTest, EndsAReadThatNobodyWaitsForAnyMore) {
  options_.retry_first = absl::Seconds(10);
  const std::string standing = "HTTP/1.1 206 Partial\r\nContent-Length: 4\r\n\r\nsl" +
                               std::string(ScriptedHttpServer::kHang);
  for (const std::string& answer : {standing, Error(503, "SlowDown")}) {
    Answer({answer});
    std::string read(4, ' ');
    const auto goes = [&] {
      return server_->requests().empty() ? absl::OkStatus() : absl::AbortedError("lost");
    };
    const absl::Time start = absl::Now();
    EXPECT_THAT(
        store_->ReadAt("a", 0, std::as_writable_bytes(std::span(read)), {.keep_going = goes}),
        StatusIs(absl::StatusCode::kAborted, "lost"));
    EXPECT_LT(absl::Now() - start, absl::Seconds(5));
  }
}

TEST_F(S3ObjectStoreTest, AsksForTheObjectThatItHasSeen) {
  Answer({Ok(Page(Entry("a/b", "&quot;e-1&quot;"), "")), ScriptedHttpServer::Answer(206, "1234")});
  ASSERT_OK_AND_ASSIGN(const ObjectStore::Listed found, store_->Find("a/b"));
  EXPECT_EQ(found.etag, "\"e-1\"");
  std::string read(4, ' ');
  ASSERT_OK(store_->ReadAt("a/b", 0, std::as_writable_bytes(std::span(read)),
                           {.must_have_etag = found.etag}));
  EXPECT_EQ(SentLines()[0], "GET /bucket?list-type=2&max-keys=1&prefix=a%2Fb");
  EXPECT_EQ(Sent()[1].headers.at("if-match"), found.etag);
  EXPECT_EQ(Sent()[1].headers.at("authorization"), Authorization(Sent()[1], "eu-central-7"));
  // An endpoint that passes over If-Match.
  const std::vector<std::pair<std::string, absl::StatusCode>> answers = {
      {ScriptedHttpServer::Answer(206, "1234", "ETag: \"e-1\"\r\n"), absl::StatusCode::kOk},
      {ScriptedHttpServer::Answer(206, "1234", "ETag: \"e-2\"\r\n"), absl::StatusCode::kAborted},
      {ScriptedHttpServer::Answer(206, "1", "ETag: \"e-2\"\r\n"), absl::StatusCode::kAborted}};
  for (const auto& [answer, code] : answers) {
    Answer({answer});
    EXPECT_EQ(store_
                  ->ReadAt("a/b", 0, std::as_writable_bytes(std::span(read)),
                           {.must_have_etag = found.etag})
                  .code(),
              code)
        << answer;
  }
  // What would become a header of its own.
  Answer({Ok(Page(Entry("a", "&quot;&#13;&#10;Host: x&quot;"), ""))});
  ASSERT_OK_AND_ASSIGN(const ObjectStore::Listed hostile, store_->Find("a"));
  EXPECT_EQ(hostile.etag, "");
}

TEST_F(S3ObjectStoreTest, TakesNoPartForAnotherAndNoOtherObject) {
  std::string read(4, ' ');
  // All of the object where a part was asked for, or less.
  for (const std::string& answer :
       {Ok("0123456789"), ScriptedHttpServer::Answer(206, "012"), Error(416, "InvalidRange")}) {
    Answer({answer});
    EXPECT_THAT(store_->ReadAt("a", 0, std::as_writable_bytes(std::span(read))),
                HasCode(absl::StatusCode::kDataLoss));
  }
  Answer({ScriptedHttpServer::Answer(206, "evil")});
  EXPECT_THAT(ReadVerified(
                  *store_, "a", {4, Sha256Hex("good")},
                  [&](int64_t, int64_t) { return std::as_writable_bytes(std::span(read)); },
                  [](std::span<const std::byte>) { return absl::OkStatus(); }),
              HasCode(absl::StatusCode::kDataLoss));
}

TEST_F(S3ObjectStoreTest, ReadsAllPagesOfAList) {
  options_.prefix = "p";
  // What is not beneath the prefix, or could be no key of ours, is passed over.
  Answer({Ok(Page(Entry("p/a/1") + Entry("p/a/../x") + Entry("q/a/1") + Entry("p/a/&e;"),
                  "<IsTruncated>true</IsTruncated>"
                  "<NextContinuationToken>a&amp;b=/&#43;</NextContinuationToken>")),
          Ok(Page(Entry("p/a/2"), "<IsTruncated>false</IsTruncated>"))});
  ASSERT_OK_AND_ASSIGN(const std::vector<ObjectStore::Listed> listed, store_->List("a"));
  ASSERT_THAT(listed, SizeIs(2));
  EXPECT_EQ(listed[0].key, "a/1");
  EXPECT_EQ(listed[0].size_bytes, 12);
  EXPECT_EQ(absl::FormatTime(listed[0].modified, absl::UTCTimeZone()),
            "2026-01-02T03:04:05.678+00:00");
  EXPECT_EQ(listed[1].key, "a/2");
  EXPECT_EQ(SentLines()[1],
            "GET /bucket?continuation-token=a%26b%3D%2F%2B&list-type=2&prefix=p%2Fa%2F");
}

TEST_F(S3ObjectStoreTest, EndsAListThatNeverEnds) {
  Answer({Ok(Page(Entry("a/1"),
                  "<IsTruncated>true</IsTruncated>"
                  "<NextContinuationToken>same</NextContinuationToken>"))});
  EXPECT_THAT(store_->List("a"), HasCode(absl::StatusCode::kDataLoss));
  const std::string large(4'000'000, '+');  // three times as long in an address
  Answer({Ok(Page("", "<IsTruncated>true</IsTruncated><NextContinuationToken>" + large +
                          "</NextContinuationToken>"))});
  EXPECT_THAT(store_->List("a"), HasCode(absl::StatusCode::kDataLoss));
  Answer({Ok(Page("<Contents><Key>a/1</Key><Size>many</Size></Contents>", ""))});
  EXPECT_THAT(store_->List("a"), HasCode(absl::StatusCode::kDataLoss));
}

constexpr char kBegun[] =
    "<InitiateMultipartUploadResult><UploadId>an/id</UploadId></InitiateMultipartUploadResult>";

TEST_F(S3ObjectStoreTest, SendsALargeObjectInParts) {
  options_.part_bytes = 4;
  Answer({Ok(kBegun), Ok("", "ETag: \"1\"\r\n"), Error(500, "InternalError"),
          Ok("", "ETag: \"2\"\r\n"), Ok("", "ETag: \"3\"\r\n"),
          Ok("<C><ETag>&quot;all&quot;</ETag></C>")});
  ASSERT_OK_AND_ASSIGN(const std::string version, store_->Put("a", "0123456789"));
  EXPECT_EQ(version, "\"all\"");
  EXPECT_THAT(SentLines(),
              ElementsAre("POST /bucket/a?uploads=", "PUT /bucket/a?partNumber=1&uploadId=an%2Fid",
                          "PUT /bucket/a?partNumber=2&uploadId=an%2Fid",
                          "PUT /bucket/a?partNumber=2&uploadId=an%2Fid",
                          "PUT /bucket/a?partNumber=3&uploadId=an%2Fid",
                          "POST /bucket/a?uploadId=an%2Fid"));
  const std::vector<SentRequest> sent = Sent();
  EXPECT_EQ(sent[3].body, "4567");
  EXPECT_EQ(sent[4].body, "89");
  EXPECT_THAT(sent[5].body,
              HasSubstr("<Part><PartNumber>2</PartNumber><ETag>&quot;2&quot;</ETag></Part>"));
  for (const SentRequest& request : sent) {
    EXPECT_EQ(request.headers.at("authorization"), Authorization(request, "eu-central-7"));
  }
}

TEST_F(S3ObjectStoreTest, LeavesNoPartsBehindWhenAnUploadFails) {
  options_.part_bytes = 4;
  Answer({Ok(kBegun), Error(403, "AccessDenied")});
  EXPECT_THAT(store_->Put("a", "0123456789"), HasCode(absl::StatusCode::kPermissionDenied));
  EXPECT_EQ(SentLines().back(), "DELETE /bucket/a?uploadId=an%2Fid");

  // The last call fails after its 200.
  Answer({Ok(kBegun), Ok(), Ok(), Ok(), Ok("<Error><Code>QuotaExceeded</Code></Error>")});
  EXPECT_THAT(store_->Put("a", "0123456789"), HasCode(absl::StatusCode::kResourceExhausted));
  EXPECT_EQ(SentLines().back(), "DELETE /bucket/a?uploadId=an%2Fid");

  testing::TempDir files;
  ASSERT_OK(PublishFile(files / "file", "0123456789"));
  Answer({Ok(kBegun), Ok()});
  EXPECT_THAT(store_->PutFile("a", files / "file", Sha256Hex("others"), {}),
              HasCode(absl::StatusCode::kDataLoss));
  EXPECT_EQ(SentLines().back(), "DELETE /bucket/a?uploadId=an%2Fid");

  Answer({Ok(kBegun), Ok()});
  int n_asked = 0;
  EXPECT_THAT(store_->PutFile("a", files / "file", Sha256Hex("0123456789"),
                              [&] {
                                return ++n_asked < 2 ? absl::OkStatus()
                                                     : absl::AbortedError("the lease is lost");
                              }),
              StatusIs(absl::StatusCode::kAborted, "the lease is lost"));
  EXPECT_EQ(SentLines().back(), "DELETE /bucket/a?uploadId=an%2Fid");
}

// As when the answer to the last call is lost: what is there tells, so the caller may look again.
TEST_F(S3ObjectStoreTest, AnUploadThatIsNotKnownAnyMoreMayHaveEndedWell) {
  options_.part_bytes = 4;
  Answer({Ok(kBegun), Ok(), Ok(), Ok(), "", Error(404, "NoSuchUpload")});
  EXPECT_THAT(store_->Put("a", "0123456789"), HasCode(absl::StatusCode::kUnavailable));
}

TEST(S3OptionsTest, ComeFromTheEnvironmentAndAreNeverRepeated) {
  const ScopedEnvironment id("AWS_ACCESS_KEY_ID", "an-id");
  const ScopedEnvironment no_token("AWS_SESSION_TOKEN", nullptr);
  const ScopedEnvironment no_endpoint("AWS_ENDPOINT_URL", nullptr);
  const ScopedEnvironment no_region("AWS_REGION", nullptr);
  {
    const ScopedEnvironment no_secret("AWS_SECRET_ACCESS_KEY", nullptr);
    EXPECT_THAT(S3OptionsFromEnvironment(), StatusIs(absl::StatusCode::kFailedPrecondition,
                                                     "an s3:// store needs AWS_SECRET_ACCESS_KEY"));
  }
  {
    const ScopedEnvironment bad("AWS_SECRET_ACCESS_KEY", "hidden\r\nHost: x");
    EXPECT_THAT(S3OptionsFromEnvironment(),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(HasSubstr("AWS_SECRET_ACCESS_KEY"), Not(HasSubstr("hidden")))));
  }
  const ScopedEnvironment secret("AWS_SECRET_ACCESS_KEY", kSecret);
  ASSERT_OK_AND_ASSIGN(const S3Options options, S3OptionsFromEnvironment());
  EXPECT_EQ(options.endpoint, "https://s3.us-east-1.amazonaws.com");
}

TEST(S3OptionsTest, AreRefusedWhereTheyCouldLeadElsewhere) {
  const S3Options good{.endpoint = "https://host:9000", .bucket = "a-bucket"};
  EXPECT_OK(CheckS3Options(good));
  for (const char* endpoint : {"", "host", "ftp://host", "file:///etc", "http://user@host",
                               "http://host/?x", "http://host/#x"}) {
    S3Options options = good;
    options.endpoint = endpoint;
    EXPECT_THAT(CheckS3Options(options), HasCode(absl::StatusCode::kInvalidArgument)) << endpoint;
  }
  for (const char* bucket : {"", "ab", "A-bucket", "a/b", "a_bucket", "..a"}) {
    S3Options options = good;
    options.bucket = bucket;
    EXPECT_THAT(CheckS3Options(options), HasCode(absl::StatusCode::kInvalidArgument)) << bucket;
  }
  S3Options options = good;
  options.prefix = "a/../b";
  EXPECT_THAT(CheckS3Options(options), HasCode(absl::StatusCode::kInvalidArgument));
}

}  // namespace
}  // namespace walsh::objects
