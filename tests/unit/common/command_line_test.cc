#include "common/command_line.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "tests/testing/scoped_environment.h"
#include "tests/testing/test_data.h"

namespace walsh {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::walsh::testing::ScopedEnvironment;

// An app with an option at the root and options of one subcommand of two.
struct Fixture {
  Fixture() : app("walsh") {
    app.add_option("--max-num-seqs", max_num_seqs);
    app.add_option("--model-root", model_roots);
    app.add_flag("--enable-reflection", enable_reflection);
    quantize = app.add_subcommand("quantize");
    quantize->add_option("model", model)->required();
    quantize->add_option("--bits", bits)->check(CLI::Range(2, 8));
    app.add_subcommand("up")->add_option("--device", device);
  }

  std::optional<int> Parse(std::vector<const char*> arguments) {
    arguments.insert(arguments.begin(), "walsh");
    ::testing::internal::CaptureStderr();
    ::testing::internal::CaptureStdout();
    const auto code = ParseCommandLine(app, static_cast<int>(arguments.size()), arguments.data());
    err = ::testing::internal::GetCapturedStderr();
    out = ::testing::internal::GetCapturedStdout();
    return code;
  }

  CLI::App app;
  CLI::App* quantize = nullptr;
  int max_num_seqs = 1;
  std::vector<std::string> model_roots;
  bool enable_reflection = false;
  std::string model;
  int bits = 4;
  std::string device = "auto";
  std::string err;
  std::string out;
};

class CommandLineTest : public ::testing::Test {
 protected:
  std::string WriteConfig(const std::string& text) {
    const std::string path = dir_ / "walsh.conf";
    std::ofstream(path) << text;
    return path;
  }
  walsh::testing::TempDir dir_;
};

TEST_F(CommandLineTest, FlagBeatsEnvironmentBeatsFileBeatsDefault) {
  const std::string path = WriteConfig("max-num-seqs = 8\n");
  struct Case {
    bool flag, environment, file;
    int expected;
  };
  for (const Case& c : std::vector<Case>{{false, false, false, 1},
                                         {false, false, true, 8},
                                         {false, true, false, 16},
                                         {false, true, true, 16},
                                         {true, false, false, 32},
                                         {true, false, true, 32},
                                         {true, true, false, 32},
                                         {true, true, true, 32}}) {
    ScopedEnvironment environment("WALSH_MAX_NUM_SEQS", c.environment ? "16" : nullptr);
    Fixture fixture;
    std::vector<const char*> arguments;
    if (c.flag) arguments.insert(arguments.end(), {"--max-num-seqs", "32"});
    if (c.file) arguments.insert(arguments.end(), {"--config", path.c_str()});
    EXPECT_EQ(fixture.Parse(arguments), std::nullopt) << fixture.err;
    EXPECT_EQ(fixture.max_num_seqs, c.expected) << c.flag << c.environment << c.file;
  }
}

TEST_F(CommandLineTest, AListIsReplacedNotJoined) {
  const std::string path = WriteConfig("model-root = /file/a\nmodel-root = /file/b\n");
  Fixture from_file;
  EXPECT_EQ(from_file.Parse({"--config", path.c_str()}), std::nullopt);
  EXPECT_THAT(from_file.model_roots, ElementsAre("/file/a", "/file/b"));

  ScopedEnvironment environment("WALSH_MODEL_ROOT", "/env");
  Fixture from_environment;
  EXPECT_EQ(from_environment.Parse({"--config", path.c_str()}), std::nullopt);
  EXPECT_THAT(from_environment.model_roots, ElementsAre("/env"));

  Fixture from_flags;
  EXPECT_EQ(from_flags.Parse(
                {"--config", path.c_str(), "--model-root", "/flag/a", "--model-root", "/flag/b"}),
            std::nullopt);
  EXPECT_THAT(from_flags.model_roots, ElementsAre("/flag/a", "/flag/b"));
}

TEST_F(CommandLineTest, FlagsAndSubcommandOptionsHaveTwinsToo) {
  ScopedEnvironment reflection("WALSH_ENABLE_REFLECTION", "true");
  ScopedEnvironment bits("WALSH_BITS", "3");
  Fixture fixture;
  EXPECT_EQ(fixture.Parse({"quantize", "m"}), std::nullopt) << fixture.err;
  EXPECT_TRUE(fixture.enable_reflection);
  EXPECT_EQ(fixture.bits, 3);
  EXPECT_EQ(fixture.model, "m");
}

TEST_F(CommandLineTest, TheFileSetsTheSubcommandThatRuns) {
  ScopedEnvironment config("WALSH_CONFIG",
                           WriteConfig("# comment\n\n bits = 2 \ndevice = \"cuda:1\"\n"
                                       "enable-reflection = true\n")
                               .c_str());
  Fixture quantize;
  EXPECT_EQ(quantize.Parse({"quantize", "m"}), std::nullopt) << quantize.err;
  EXPECT_EQ(quantize.bits, 2);
  EXPECT_TRUE(quantize.enable_reflection);
  EXPECT_EQ(quantize.device, "auto");  // belongs to `up`

  Fixture up;
  EXPECT_EQ(up.Parse({"up"}), std::nullopt) << up.err;
  EXPECT_EQ(up.device, "cuda:1");
  EXPECT_EQ(up.bits, 4);
}

// One file for the client and both daemons.
TEST_F(CommandLineTest, KeysOfOtherBinariesAreLeftToThem) {
  const std::string path = WriteConfig("job-lease-seconds = 3\nmax-num-seqs = 8\nno-eval = true\n");
  Fixture fixture;
  EXPECT_EQ(fixture.Parse({"--config", path.c_str()}), std::nullopt) << fixture.err;
  EXPECT_EQ(fixture.max_num_seqs, 8);
}

TEST_F(CommandLineTest, AnEmptyVariableIsNotSet) {
  ScopedEnvironment environment("WALSH_MAX_NUM_SEQS", "");
  const std::string path = WriteConfig("max-num-seqs = 8\n");
  Fixture fixture;
  EXPECT_EQ(fixture.Parse({"--config", path.c_str()}), std::nullopt);
  EXPECT_EQ(fixture.max_num_seqs, 8);
}

TEST_F(CommandLineTest, UsageErrorsEndWithTwoAndNameTheFault) {
  struct Case {
    std::string config;
    std::vector<const char*> arguments;
    const char* message;
  };
  const std::vector<Case> cases = {
      {"max-nmu-seqs = 8\n", {}, "unknown key 'max-nmu-seqs'"},
      {"max-num-seqs 8\n", {}, "line 1: expected 'key = value'"},
      {"max-num-seqs = many\n", {}, "max-num-seqs"},
      {"", {"--no-such-flag"}, "--no-such-flag"},
      {"", {"quantize", "m", "--bits", "9"}, "--bits"},
      {"", {"quantize"}, "model"},
  };
  for (const Case& c : cases) {
    const std::string path = WriteConfig(c.config);
    std::vector<const char*> arguments = {"--config", path.c_str()};
    arguments.insert(arguments.end(), c.arguments.begin(), c.arguments.end());
    Fixture fixture;
    EXPECT_EQ(fixture.Parse(arguments), kExitUsage) << c.message;
    EXPECT_THAT(fixture.err, HasSubstr(c.message));
  }
}

TEST_F(CommandLineTest, AMissingFileIsAnErrorOnlyWhenNamed) {
  Fixture fixture;
  EXPECT_EQ(fixture.Parse({}), std::nullopt);
  EXPECT_EQ(fixture.Parse({"--config", "/no/such/file"}), kExitUsage);
  ScopedEnvironment config("WALSH_CONFIG", "/no/such/file");
  Fixture from_environment;
  EXPECT_EQ(from_environment.Parse({}), kExitUsage);
  EXPECT_THAT(from_environment.err, HasSubstr("/no/such/file"));
}

TEST_F(CommandLineTest, HelpAndVersionEndWithZero) {
  Fixture help;
  EXPECT_EQ(help.Parse({"--help"}), kExitOk);
  EXPECT_THAT(help.out, HasSubstr("--max-num-seqs"));
  EXPECT_THAT(help.err, IsEmpty());
  Fixture version;
  EXPECT_EQ(version.Parse({"--version"}), kExitOk);
  EXPECT_THAT(version.out, HasSubstr("0."));
}

TEST_F(CommandLineTest, NumbersInTheEnvironmentAreChecked) {
  ScopedEnvironment environment("WALSH_MAX_NUM_SEQS", "many");
  Fixture fixture;
  EXPECT_EQ(fixture.Parse({}), kExitUsage);
  EXPECT_THAT(fixture.err, HasSubstr("max-num-seqs"));
}

}  // namespace
}  // namespace walsh
