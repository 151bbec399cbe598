#include "common/tls_files.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/publish.h"
#include "tests/testing/certificates.h"
#include "tests/testing/metric_value.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"

namespace walsh {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
using ::walsh::testing::CertificateAuthority;
using ::walsh::testing::Issued;
using ::walsh::testing::MetricValue;
using ::walsh::testing::StatusIs;
using ::walsh::testing::TempDir;

class TlsFilesTest : public ::testing::Test {
 protected:
  void Write(const Issued& issued) {
    ASSERT_OK(PublishFile(files_.certificate, issued.certificate));
    ASSERT_OK(PublishFile(files_.private_key, issued.private_key));
  }
  absl::StatusOr<TlsPems> Read() const { return ReadTlsFiles(files_, absl::Now()); }

  const TempDir dir_;
  CertificateAuthority ca_;
  TlsFiles files_{.certificate = dir_ / "tls.crt", .private_key = dir_ / "tls.key"};
};

TEST_F(TlsFilesTest, NoFilesAreNoTls) {
  ASSERT_OK_AND_ASSIGN(const TlsPems pems, ReadTlsFiles({}, absl::Now()));
  EXPECT_EQ(pems, TlsPems());
}

TEST_F(TlsFilesTest, AFittingPairIsTaken) {
  const absl::Time expires = absl::FromUnixSeconds(absl::ToUnixSeconds(absl::Now()) + 3600);
  const Issued issued = ca_.Issue({.expires = expires});
  Write(issued);
  ASSERT_OK_AND_ASSIGN(const TlsPems pems, Read());
  EXPECT_EQ(pems.certificate, issued.certificate);
  EXPECT_EQ(pems.private_key, issued.private_key);
  EXPECT_EQ(pems.expires, expires);
}

TEST_F(TlsFilesTest, WhatWouldFailEveryHandshakeIsRefused) {
  const Issued good = ca_.Issue();
  const Issued other = ca_.Issue();
  const std::string half = good.certificate.substr(0, good.certificate.size() / 2);
  const struct {
    Issued issued;
    const char* why;
  } kCases[] = {
      {{good.certificate, other.private_key}, "--tls-key: it is not the key"},
      {ca_.Issue({.expires = absl::Now() - absl::Seconds(2)}), "--tls-cert: it expired at"},
      {ca_.Issue({.begins = absl::Now() + absl::Minutes(30)}),
       "--tls-cert: it is not valid before"},
      {{"garbage", good.private_key}, "--tls-cert: it holds no PEM certificate"},
      {{"", good.private_key}, "--tls-cert: it holds no PEM certificate"},
      {{half, good.private_key}, "--tls-cert: a certificate in it is damaged"},
      {{good.certificate + half, good.private_key}, "--tls-cert: a certificate in it is damaged"},
      {{good.certificate, "garbage"}, "--tls-key: it holds no PEM private key"},
      {{good.private_key, good.certificate}, "--tls-cert: it holds no PEM certificate"},
  };
  for (const auto& bad : kCases) {
    Write(bad.issued);
    EXPECT_THAT(Read(), StatusIs(absl::StatusCode::kInvalidArgument,
                                 AllOf(HasSubstr(bad.why), Not(HasSubstr("BEGIN")))));
  }
}

TEST_F(TlsFilesTest, FlagsThatMeanNothingAloneAreRefused) {
  EXPECT_THAT(ReadTlsFiles({.certificate = "x"}, absl::Now()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--tls-key")));
  EXPECT_THAT(ReadTlsFiles({.client_ca = "x"}, absl::Now()),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--tls-client-ca")));
  EXPECT_THAT(ReadTlsFiles({.ca = dir_ / "absent"}, absl::Now()),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("--tls-ca")));
}

TEST_F(TlsFilesTest, ADaemonsCertificateIsOfTheCaAndFitForBothDirections) {
  files_.ca = dir_ / "ca.crt";
  files_.certificate_is_of_ca = true;
  ASSERT_OK(PublishFile(files_.ca, ca_.pem()));
  Write(ca_.Issue());
  EXPECT_OK(Read());
  Write(CertificateAuthority("another CA").Issue());
  EXPECT_THAT(Read(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--tls-ca")));
  Write(ca_.Issue({.uses = "serverAuth"}));
  EXPECT_THAT(Read(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("a client's")));
  Write(ca_.Issue({.uses = "clientAuth"}));
  EXPECT_THAT(Read(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("a server's")));
  // While a CA is replaced the file holds the old one and the new one.
  CertificateAuthority next("the next CA");
  ASSERT_OK(PublishFile(files_.ca, ca_.pem() + next.pem()));
  Write(next.Issue());
  EXPECT_OK(Read());
}

// The order in which an operator's two copies land is not the service's to choose.
TEST_F(TlsFilesTest, TheLastGoodPairStaysUntilAGoodOneIsThere) {
  const Issued first = ca_.Issue();
  Write(first);
  ASSERT_OK_AND_ASSIGN(const auto watched, WatchTlsFiles(files_));
  const auto before = watched->Get();
  EXPECT_EQ(before->certificate, first.certificate);

  const Issued second = ca_.Issue({.expires = absl::Now() + absl::Hours(2)});
  ASSERT_OK(PublishFile(files_.private_key, second.private_key));
  watched->Poll();
  watched->Poll();
  EXPECT_EQ(watched->Get(), before) << "the key came first";
  EXPECT_EQ(MetricValue("walsh_config_last_reload_successful", {R"(config="tls")"}), 0);
  EXPECT_EQ(MetricValue("walsh_config_reloads_total", {R"(config="tls")", R"(result="failed")"}),
            1);

  ASSERT_OK(PublishFile(files_.certificate, second.certificate));
  watched->Poll();
  EXPECT_EQ(watched->Get()->certificate, second.certificate);
  EXPECT_EQ(MetricValue("walsh_config_last_reload_successful", {R"(config="tls")"}), 1);
  EXPECT_EQ(MetricValue("walsh_config_reloads_total", {R"(config="tls")", R"(result="ok")"}), 1);
  EXPECT_EQ(MetricValue("walsh_tls_certificate_expiry_timestamp_seconds", {}),
            static_cast<double>(absl::ToUnixSeconds(watched->Get()->expires)));

  const auto kept = watched->Get();
  RemoveTree(files_.certificate).IgnoreError();
  watched->Poll();
  Write(ca_.Issue({.expires = absl::Now() - absl::Seconds(2)}));
  watched->Poll();
  EXPECT_EQ(watched->Get(), kept);
}

}  // namespace
}  // namespace walsh
