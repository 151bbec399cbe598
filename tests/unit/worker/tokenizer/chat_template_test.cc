// Chat templates against jinja2 as Hugging Face sets it up
// (tests/golden/tokenizer/make_chat_golden.py), and the limits of the interpreter.
#include "worker/tokenizer/chat_template.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <ctime>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "common/limits.h"
#include "tests/testing/golden.h"
#include "tests/testing/random_seed.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/test_data.h"
#include "tests/unit/worker/tokenizer/tokenizer_fixtures.h"
#include "worker/io/checkpoint.h"
#include "worker/tokenizer/jinja/evaluator.h"
#include "worker/tokenizer/jinja/parser.h"

namespace walsh {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::StatusIs;
using Json = nlohmann::ordered_json;

Json OrderedGolden(const std::string& name) {
  return Json::parse(testing::GoldenFile("tokenizer/" + name + ".json"));
}

jinja::Value FromJson(const Json& json) {
  using jinja::Value;
  if (json.is_boolean()) return Value(json.get<bool>());
  if (json.is_number_integer()) return Value(json.get<int64_t>());
  if (json.is_number_float()) return Value(json.get<double>());
  if (json.is_string()) return Value(json.get<std::string>());
  if (json.is_array()) {
    std::vector<Value> items;
    for (const Json& item : json) items.push_back(FromJson(item));
    return Value::MakeList(std::move(items));
  }
  if (json.is_object()) {
    std::vector<std::pair<std::string, Value>> items;
    for (const auto& [key, value] : json.items()) items.emplace_back(key, FromJson(value));
    return Value::MakeMap(std::move(items));
  }
  return Value(jinja::None{});
}

absl::Time GoldenTime(const std::string& text) {
  absl::Time time;
  std::string error;
  EXPECT_TRUE(absl::ParseTime(absl::RFC3339_full, text, &time, &error)) << error;
  return time;
}

absl::StatusOr<std::string> Render(const std::string& source, const Json& variables,
                                   absl::Time now = absl::UnixEpoch()) {
  absl::StatusOr<jinja::Block> block = jinja::ParseTemplate(source);
  if (!block.ok()) return block.status();
  jinja::Environment environment{.now = now};
  for (const auto& [name, value] : variables.items()) {
    environment.variables.emplace_back(name, FromJson(value));
  }
  return jinja::RenderTemplate(*block, environment);
}

void ExpectAsGolden(const absl::StatusOr<std::string>& output, const Json& golden,
                    const std::string& what) {
  if (golden.contains("output")) {
    ASSERT_THAT(output, testing::IsOk()) << what;
    EXPECT_EQ(*output, golden["output"].get<std::string>()) << what;
    return;
  }
  const bool is_raised = golden["error"] == "TemplateError";
  const bool is_unknown = golden["error"] == "TemplateAssertionError";
  EXPECT_THAT(
      output,
      StatusIs(is_unknown ? absl::StatusCode::kUnimplemented : absl::StatusCode::kInvalidArgument,
               AllOf(HasSubstr("chat template, line "),
                     HasSubstr(is_raised ? golden["message"].get<std::string>() : ""))))
      << what;
}

TEST(ChatTemplateTest, EverySnippetOfTheLanguage) {
  const Json golden = OrderedGolden("jinja_snippets");
  for (const Json& snippet : golden["snippets"]) {
    const std::string source = snippet["source"];
    ExpectAsGolden(Render(source, golden["variables"], GoldenTime(golden["now"])), snippet, source);
  }
}

// Our templates and those of the models at hand, with every conversation.
void ExpectTemplate(const std::string& name, const std::string& source) {
  const Json golden = OrderedGolden("chat_templates");
  int n_cases = 0;
  for (const Json& expected : golden["cases"]) {
    if (expected["template"] != name) continue;
    ++n_cases;
    const std::string conversation = expected["conversation"];
    const Json& messages = golden["conversations"][conversation];
    Json variables = {{"messages", messages},
                      {"bos_token", "<s>"},
                      {"eos_token", "</s>"},
                      {"tools", nullptr},
                      {"documents", nullptr}};
    variables.update(expected["variant"]);
    const std::string what = name + ", " + conversation + ", " + expected["variant"].dump();
    ExpectAsGolden(Render(source, variables, GoldenTime(golden["now"])), expected, what);

    // The public interface has roles and contents only.
    ChatTemplate::Variables plain{
        .add_generation_prompt = expected["variant"]["add_generation_prompt"],
        .bos_token = "<s>",
        .eos_token = "</s>",
        .now = GoldenTime(golden["now"])};
    bool is_plain = expected["variant"].size() == 1;
    for (const Json& message : messages) {
      is_plain &= message.size() == 2;
      plain.messages.push_back({message["role"], message["content"]});
    }
    if (!is_plain) continue;
    ASSERT_OK_AND_ASSIGN(const auto chat_template, ChatTemplate::Parse(source));
    ExpectAsGolden(chat_template->Render(plain), expected, what);
  }
  EXPECT_GE(n_cases, 26) << name;
}

TEST(ChatTemplateTest, OwnTemplates) {
  const Json golden = OrderedGolden("chat_templates");
  for (const auto& [name, source] : golden["templates"].items()) ExpectTemplate(name, source);
}

std::string TemplateOfConfig(const std::string& path) {
  return nlohmann::json::parse(testing::ReadFileOrDie(path))["chat_template"];
}

TEST(ChatTemplateTest, Llama3) {
  WALSH_REQUIRE_DATA(path, "tokenizers/llama3/tokenizer_config.json");
  ExpectTemplate("llama3", TemplateOfConfig(path));
}

TEST(ChatTemplateTest, Qwen3) {
  WALSH_REQUIRE_DATA(path, "tokenizers/qwen3/tokenizer_config.json");
  ExpectTemplate("qwen3", TemplateOfConfig(path));
}

TEST(ChatTemplateTest, SmolLm2) {
  WALSH_REQUIRE_SMOLLM2(path);
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(path));
  ExpectTemplate("smollm2", checkpoint->tokenizer().chat_template);
}

TEST(ChatTemplateTest, WhatTheSubsetLacksIsNamedWithItsLine) {
  const std::map<std::string, std::string> cases = {
      {"\n{% include 'x' %}", "line 2: the statement 'include'"},
      {"{% raw %}x{% endraw %}", "the statement 'raw'"},
      {"{% call m() %}{% endcall %}", "the statement 'call'"},
      {"{% filter upper %}x{% endfilter %}", "the statement 'filter'"},
      {"{{ x | shuffle }}", "filter 'shuffle'"},
      {"{{ x is purple }}", "test 'purple'"},
      {"{{ 'a'.encode('utf-8') }}", "method 'encode' of text"},
      {"{{ {}.update({}) }}", "method 'update' of dict"},
      {"{{ [].append(1) }}", "method 'append' of list"},
      {"\n\n{{ cycler(1) }}", "line 3: 'cycler'"},
      {"{% for i in [1] %}{{ loop.cycle(1) }}{% endfor %}", "'loop.cycle'"},
      {"{% for i in [1] recursive %}{% endfor %}", "'for … recursive'"},
      {"{{ f(*x) }}", "'*' before an argument"},
      {"{{ 'a%s' % 1 }}", "'%' on text"},
      {"{{ {1: 2} }}", "a key of type int"},
      {"{{ 99999999999999999999 }}", "the number 99999999999999999999"},
      {"{{ 9223372036854775807 + 1 }}", "an integer beyond 64 bits"},
      {"{{ {} | tojson(sort_keys=true) }}", "argument 'sort_keys' of 'tojson'"},
      {"{{ {} | tojson(false, 2, (',', ':')) }}", "argument 'separators' of 'tojson'"},
      {"{{ '0x1f' | int(0, 16) }}", "argument 'base' of 'int'"},
      {"{{ '\u0663' | int }}", "'int' of digits beyond ASCII"},
      {"{{ '1e30' | int }}", "an integer beyond 64 bits"},
      {"{% set ns.b %}x{% endset %}", "'set' of a namespace's attribute to a block"},
      {"{% for (a, b), c in x %}{% endfor %}", "a name in brackets"},
      {"{% for a, (b, c) in x %}{% endfor %}", "a name in brackets"},
      {"{{ a[1, 2] }}", "a tuple in the brackets after a value"},
      {"{{ a[1:2, 3] }}", "a tuple in the brackets after a value"},
      {"{{ " + std::string(257, 'x') + " }}", "a name of 257 bytes"},
      {"{{ strftime_now('%q') }}", "strftime_now with '%q'"},
      {"{{ '\\N{BULLET}' }}", "the escape '\\N'"},
      {"{{ namespace() }}", "output of a namespace"},
  };
  for (const auto& [source, message] : cases) {
    EXPECT_THAT(Render(source, Json::object()),
                StatusIs(absl::StatusCode::kUnimplemented,
                         AllOf(HasSubstr("chat template, line "), HasSubstr(message))))
        << source;
  }
}

TEST(ChatTemplateTest, SecretsOfPythonAreNotThere) {
  for (const std::string source :
       {"{{ ''.__class__ }}", "{{ messages.__init__ }}", "{{ self.__dict__ }}x",
        "{{ raise_exception.__globals__ }}", "{{ namespace().__class__ }}"}) {
    const auto output = Render(source, {{"messages", Json::array()}});
    if (output.ok()) {
      EXPECT_EQ(*output, "") << source;
    }
  }
}

std::string Repeat(const std::string& text, int n) {
  std::string out;
  for (int i = 0; i < n; ++i) out += text;
  return out;
}

TEST(ChatTemplateTest, LimitsHold) {
  const std::string nest_half = Repeat("(", 1000) + "1";
  const std::map<std::string, std::string> cases = {
      {"steps", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"},
      {"output", "{% for i in range(99999) %}" + std::string(1000, 'x') + "{% endfor %}"},
      {"long text",
       "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(99) %}"
       "{% set ns.x = ns.x + ns.x %}{% endfor %}"},
      {"repeated text", "{{ 'x' * 99999999999 }}"},
      {"repeated list", "{{ ([1] * 99999999999) | length }}"},
      {"replaced text", "{{ ('x' * 99999).replace('x', 'y' * 99999) }}"},
      {"joined text", "{{ ('x' * 99999) | list | join('y' * 99999) }}"},
      {"range", "{{ range(99999999999) | length }}"},
      {"brackets", "{{ " + nest_half + Repeat(")", 1000) + " }}"},
      {"lists", "{{ " + Repeat("[", 1000) + Repeat("]", 1000) + " }}"},
      {"blocks", Repeat("{% if 1 %}", 1000)},
      {"negations", "{{ " + Repeat("not ", 1000) + "1 }}"},
      {"signs", "{{ " + Repeat("- ", 1000) + "1 }}"},
      {"else chain", "{{ " + Repeat("1 if 0 else ", 1000) + "1 }}"},
      {"macro recursion", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"},
      {"value depth",
       "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}"
       "{% set ns.x = [ns.x] %}{% endfor %}"},
      {"exponential value",
       "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
       "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}"},
      {"source", std::string(limits::kTemplateBytesMax + 1, 'x')},
      {"equal",
       "{% set x = 'x' * 999999 %}{% for i in range(99999) %}{{ x == x ~ '' }}{% endfor %}"},
  };
  for (const auto& [name, source] : cases) {
    EXPECT_THAT(Render(source, Json::object()), HasCode(absl::StatusCode::kResourceExhausted))
        << name;
  }
}

// Processor time of this thread: other work on the machine does not count.
double CpuSeconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

int64_t PeakBytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{1024} * usage.ru_maxrss;
}

// A template that repeats `operation` 20,000 times, with a text of 4 MB in `big`.
std::string Repeated(const std::string& operation, const std::string& preparation = "") {
  return "{% set big = 'a' * 4000000 %}{% set half = 'a' * 2000000 %}" + preparation +
         "{% for i in range(20000) %}{% set x = " + operation + " %}{% endfor %}";
}

// `names` different pieces of text, joined.
std::string Numbered(int n, const std::string& before, const std::string& after) {
  std::string out;
  for (int i = 0; i < n; ++i) out += before + std::to_string(i) + after;
  return out;
}

// However a template spends its steps, they are over soon and with little memory.
TEST(ChatTemplateTest, HostileTemplatesTakeLittleTimeAndMemory) {
  constexpr double kSecondsMax = 20.0;  // under a sanitizer; otherwise a few
  constexpr int64_t kBytesMax = int64_t{1} << 30;
  const std::string many = "{% set many = range(99999) | list %}";
  const std::string maps = "{% set one = {" + Numbered(5000, "'", "': 1,") + "} %}{% set two = {" +
                           Numbered(5000, "'", "': 1,") + "} %}";
  const std::map<std::string, std::string> cases = {
      {"in", Repeated("(half ~ 'b') in big")},
      {"short in", Repeated("('a' * 200 ~ 'b') in big")},
      {"find", Repeated("big.find(half ~ 'b')")},
      {"rfind", Repeated("big.rfind('b' ~ half)")},
      {"split", Repeated("big.split(half ~ 'b')")},
      {"rsplit", Repeated("big.rsplit('b' ~ half, 9)")},
      {"count", Repeated("big.count(half ~ 'b')")},
      {"replace", Repeated("big.replace(half ~ 'b', '')")},
      {"replace filter", Repeated("big | replace(half ~ 'b', '')")},
      {"strip", Repeated("big.strip('b' * 1000000 ~ 'a')")},
      {"strip little", Repeated("''.strip(big)")},
      {"trim", Repeated("big | trim('b' * 1000000 ~ 'a')")},
      {"prefix", Repeated("''.startswith(big)")},
      {"prefixes", Repeated("''.startswith(bigs)", "{% set bigs = ([big] * 99999) %}")},
      {"upper", Repeated("big.upper()")},
      {"length", Repeated("big | length")},
      {"character", Repeated("big[5]")},
      {"missing element", Repeated("[1][big]")},
      {"missing attribute",
       "{{ range(99999) | map(attribute='" + std::string(250'000, 'x') + "') | list }}"},
      {"repr", Repeated("list ~ ''", many + "{% set list = [many] * 10 %}")},
      {"many names",
       Numbered(15'000, "{%set a", "=1%}") + "{% for i in range(99999) %}{{ a14999 }}{% endfor %}"},
      {"equal maps", maps + "{% for i in range(99999) %}{% set x = one == two %}{% endfor %}"},
      {"map look-up", maps + "{% for i in range(99999) %}{% set x = one.zz %}{% endfor %}"},
      {"dict with names", "{% for i in range(99999) %}{% set x = dict(" +
                              Numbered(20'000, "a", "=1,") + ") %}{% endfor %}"},
      {"namespace", "{% set ns = namespace() %}" + Numbered(9'000, "{%set ns.a", "=1%}") +
                        "{% for i in range(99999) %}{% set x = ns.a8999 %}{% endfor %}"},
      {"slices", many + "{% for i in range(99999) %}{% set ns = many[1:] %}{% endfor %}"},
      {"kept slices", many + "{{ [" + Repeat("many[1:],", 20'000) + "] | length }}"},
      {"kept lists", many + "{{ [" + Repeat("many|list,", 20'000) + "] | length }}"},
      {"kept reverses", many + "{{ [" + Repeat("many|reverse,", 15'000) + "] | length }}"},
      {"nested loops", many + Repeat("{%for i in many%}", 50) + Repeat("{%endfor%}", 50)},
  };
  for (const auto& [name, source] : cases) {
    const int64_t bytes = PeakBytes();
    const double start = CpuSeconds();
    const auto output = Render(source, Json::object());
    EXPECT_FALSE(absl::IsInvalidArgument(output.status())) << name << ": " << output.status();
    const double seconds = CpuSeconds() - start;
    EXPECT_LT(seconds, kSecondsMax) << name;
    EXPECT_LT(PeakBytes() - bytes, kBytesMax) << name;
  }
}

// Templates come from strangers' files. Method: pieces of good templates, cut, joined and changed.
TEST(ChatTemplateTest, DamagedTemplatesNeverCrash) {
  const Json golden = OrderedGolden("chat_templates");
  std::vector<std::string> sources;
  for (const auto& [name, source] : golden["templates"].items()) sources.push_back(source);
  const Json snippets = OrderedGolden("jinja_snippets");
  for (const Json& snippet : snippets["snippets"]) {
    sources.push_back(snippet["source"]);
  }
  const Json variables = {{"messages", golden["conversations"]["turns"]}, {"tools", nullptr}};
  std::mt19937_64 random(testing::RandomSeed());
  for (int round = 0; round < 20'000; ++round) {
    std::string source = sources[random() % sources.size()];
    const std::string& other = sources[random() % sources.size()];
    source.insert(random() % (source.size() + 1),
                  other.substr(random() % (other.size() + 1), random() % 20));
    if (!source.empty()) source[random() % source.size()] = static_cast<char>(random() % 128);
    const auto output = Render(source, variables);
    if (!output.ok()) {
      EXPECT_THAT(std::string(output.status().message()), HasSubstr("chat template")) << source;
    }
  }
}

TEST(ChatTemplateTest, LongChainsAreNotDepth) {
  const std::string sum = "{{ 0" + Repeat(" + 1", 5000) + " }}";
  EXPECT_EQ(*Render(sum, Json::object()), "5000");
  EXPECT_THAT(Render("{{ x" + Repeat(".a", 1000) + " }}", Json::object()),
              HasCode(absl::StatusCode::kUnimplemented));
}

TEST(ChatTemplateTest, NamespacesInACircleAreFreed) {  // AddressSanitizer's leak check sees it
  EXPECT_EQ(*Render("{% set a = namespace() %}{% set b = namespace(a=a) %}{% set a.b = [b] %}ok",
                    Json::object()),
            "ok");
}

TEST(ChatTemplateTest, MessagesMustBeUtf8AndNotTooMany) {
  ASSERT_OK_AND_ASSIGN(const auto chat_template, ChatTemplate::Parse("{{ messages | length }}"));
  EXPECT_THAT(chat_template->Render({.messages = {{"user", "\xFF"}}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("messages[0]")));
  std::vector<ChatMessage> messages(limits::kChatMessagesMax + 1, {"user", "x"});
  EXPECT_THAT(chat_template->Render({.messages = messages}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at most 4096")));
  messages.pop_back();
  EXPECT_EQ(*chat_template->Render({.messages = messages}), "4096");
}

// The longest conversation that is allowed fits the step limit with the templates at hand.
TEST(ChatTemplateTest, TheLongestConversationRenders) {
  const Json golden = OrderedGolden("chat_templates");
  std::vector<ChatMessage> messages;
  for (int i = 0; i < limits::kChatMessagesMax; ++i) {
    messages.push_back({i % 2 == 0 ? "user" : "assistant", std::string(200, 'x')});
  }
  std::map<std::string, std::string> sources = golden["templates"];
  const std::string qwen3 = testing::TestData("tokenizers/qwen3/tokenizer_config.json");
  if (!qwen3.empty()) sources["qwen3"] = TemplateOfConfig(qwen3);
  for (const auto& [name, source] : sources) {
    ASSERT_OK_AND_ASSIGN(const auto chat_template, ChatTemplate::Parse(source));
    EXPECT_OK(chat_template->Render({.messages = messages})) << name;
  }
}

}  // namespace
}  // namespace walsh
