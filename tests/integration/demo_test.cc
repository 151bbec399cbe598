// Goal:   the demo talks to the service that it started and deletes what a demo made, whatever the
//         person's environment points at.
// Method: the real script and the real client between two fake services: one stands for what
//         `walsh up` would start, the other for the service that the person's environment names.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "common/publish.h"
#include "tests/testing/fake_server.h"
#include "tests/testing/service_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"

namespace walsh {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::walsh::testing::FakeServer;
using ::walsh::testing::TempDir;

void AddModelAndJob(FakeServer& server, const std::string& name) {
  v1::Model model;
  model.set_name("models/" + name);
  model.set_state(v1::Model::READY);
  server.AddModel(model);
  v1::QuantizationJobEvent succeeded;
  succeeded.set_state(v1::QuantizationJob::SUCCEEDED);
  server.AddEvent("quantizationJobs/job-" + name, succeeded);
  server.mutable_job("quantizationJobs/job-" + name)->set_model_name(name);
}

std::vector<std::string> ModelNames(const FakeServer& server) {
  client::ClientOptions options;
  options.address = server.address();
  const auto models = client::Client(options).ListModels();
  EXPECT_OK(models);
  std::vector<std::string> names;
  if (!models.ok()) return names;
  for (const v1::Model& model : models->models()) names.push_back(model.name());
  return names;
}

TEST(DemoTest, TouchesOnlyTheServiceThatItStartedAndWhatADemoMade) {
  FakeServer decoy;
  AddModelAndJob(decoy, "smollm2-4bit");
  AddModelAndJob(decoy, "precious");
  FakeServer own;
  AddModelAndJob(own, "smollm2-4bit");
  AddModelAndJob(own, "smollm2-2bit");
  AddModelAndJob(own, "mine");

  // A `walsh` whose `up` says where `own` listens, and whose jobs end at once.
  const TempDir dir;
  ASSERT_OK(PublishFile(dir / "walsh", absl::StrCat("#!/bin/sh\n"
                                                    "echo \"$@\" >> '",
                                                    dir / "commands",
                                                    "'\n"
                                                    "for argument in \"$@\"; do\n"
                                                    "  case $argument in\n"
                                                    "    up) printf 'walsh is up\\n  gRPC     ",
                                                    own.address(),
                                                    "\\n'\n"
                                                    "        exec sleep 600 ;;\n"
                                                    "    quantize) exit 0 ;;\n"
                                                    "  esac\n"
                                                    "done\n"
                                                    "exec '",
                                                    testing::BinaryPath("walsh"), "' \"$@\"\n")));
  ASSERT_EQ(chmod((dir / "walsh").c_str(), 0755), 0);
  ASSERT_OK(PublishFile(dir / "model.gguf", "not read"));

  const char* source = std::getenv("WALSH_SOURCE_DIR");
  client::SpawnOptions demo;
  demo.argv = {absl::StrCat(source == nullptr ? "." : source, "/client/demo.sh")};
  demo.environment = {{"WALSH_BIN_DIR", dir.path()},
                      {"WALSH_CACHE_DIR", dir / "cache"},
                      {"WALSH_SMOLLM2", dir / "model.gguf"},
                      {"WALSH_SERVER", decoy.address()},
                      {"WALSH_DATA_DIR", dir / "elsewhere"},
                      {"WALSH_CONFIG", dir / "no-such-file"},
                      {"WALSH_OUTPUT", "json"}};
  ASSERT_OK_AND_ASSIGN(const client::Output output, client::RunCommand(demo, "", absl::Minutes(2)));
  EXPECT_EQ(output.exit_code, 0) << output.out << output.err;
  EXPECT_THAT(output.out, HasSubstr("Hello, world"));  // the answer of the fake

  EXPECT_EQ(decoy.n_peers(), 0);
  EXPECT_THAT(ModelNames(own), ElementsAre("models/mine"));
  const std::string commands = ReadFile(dir / "commands", 1 << 20).value_or("");
  for (const char* name : {"smollm2-4bit", "smollm2-2bit"}) {
    EXPECT_THAT(commands, HasSubstr(absl::StrCat("jobs delete job-", name, "\n")));
    EXPECT_THAT(commands, HasSubstr(absl::StrCat("models delete ", name, " --force\n")));
  }
  EXPECT_THAT(commands, ::testing::Not(HasSubstr("delete mine")));
  EXPECT_THAT(commands, ::testing::Not(HasSubstr("delete job-mine")));
}

}  // namespace
}  // namespace walsh
