#include "common/command_line.h"

#include <cctype>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <istream>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/config_keys.h"
#include "common/version.h"

namespace walsh {
namespace {

std::string EnvironmentName(std::string_view long_name) {
  std::string name = "WALSH_";
  for (const char c : long_name) {
    name.push_back(c == '-' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c))));
  }
  return name;
}

bool IsSetInEnvironment(std::string_view long_name) {
  const char* value = std::getenv(EnvironmentName(long_name).c_str());
  return value != nullptr && *value != '\0';
}

std::string_view Trim(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r";
  const size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kSpace) - begin + 1);
}

// The subcommands that the command line named, outermost first.
std::vector<const CLI::App*> ActiveApps(const CLI::App& root) {
  std::vector<const CLI::App*> apps = {&root};
  for (const CLI::App* app = &root; !app->get_subcommands().empty();) {
    app = app->get_subcommands().front();
    apps.push_back(app);
  }
  return apps;
}

bool AnySubcommandHas(const CLI::App& app, const std::string& flag) {
  if (app.get_option_no_throw(flag) != nullptr) return true;
  for (const CLI::App* subcommand : app.get_subcommands([](const CLI::App*) { return true; })) {
    if (AnySubcommandHas(*subcommand, flag)) return true;
  }
  return false;
}

// The file: `key = value` lines, `#` comments; a key given twice makes a list. CLI11 lets the file
// win over the environment, so what the environment sets is left out here.
class ConfigFile : public CLI::Config {
 public:
  explicit ConfigFile(const CLI::App* app) : app_(app) {}

  std::string to_config(const CLI::App*, bool, bool, std::string) const override { return ""; }

  std::vector<CLI::ConfigItem> from_config(std::istream& input) const override {
    std::vector<CLI::ConfigItem> parsed;
    std::string line;
    for (int number = 1; std::getline(input, line); ++number) {
      const std::string_view text = Trim(line);
      if (text.empty() || text.front() == '#') continue;
      const size_t equals = text.find('=');
      if (equals == std::string_view::npos) {
        throw CLI::ConfigError("config file, line " + std::to_string(number) +
                               ": expected 'key = value'");
      }
      Add(std::string(Trim(text.substr(0, equals))), std::string(Trim(text.substr(equals + 1))),
          parsed);
    }
    return parsed;
  }

 private:
  void Add(const std::string& key, std::string value, std::vector<CLI::ConfigItem>& parsed) const {
    if (!AnySubcommandHas(*app_, "--" + key)) {
      if (IsConfigKey(key)) return;  // a setting of another binary
      throw CLI::ConfigError("config file: unknown key '" + key + "'");
    }
    if (IsSetInEnvironment(key)) return;
    if (value.size() >= 2 && value.front() == '"' && value.back() == '"') {
      value = value.substr(1, value.size() - 2);
    }
    CLI::ConfigItem item;
    item.name = key;
    bool is_active = false;
    for (const CLI::App* app : ActiveApps(*app_)) {
      if (app != app_) item.parents.push_back(app->get_name());
      if (app->get_option_no_throw("--" + key) != nullptr) {
        is_active = true;
        break;
      }
    }
    if (!is_active) return;  // a setting of another subcommand
    for (CLI::ConfigItem& earlier : parsed) {
      if (earlier.name == item.name) {
        earlier.inputs.push_back(std::move(value));
        return;
      }
    }
    item.inputs.push_back(std::move(value));
    parsed.push_back(std::move(item));
  }

  const CLI::App* app_;
};

void AddEnvironmentTwins(CLI::App& app) {
  for (CLI::Option* option : app.get_options()) {
    if (option == app.get_help_ptr() || option == app.get_version_ptr() ||
        option == app.get_config_ptr() || option->get_lnames().empty()) {
      continue;
    }
    option->envname(EnvironmentName(option->get_lnames().front()));
  }
  for (CLI::App* subcommand : app.get_subcommands([](const CLI::App*) { return true; })) {
    AddEnvironmentTwins(*subcommand);
  }
}

void AddConfigFile(CLI::App& app) {
  const char* from_environment = std::getenv("WALSH_CONFIG");
  const bool is_given = from_environment != nullptr && *from_environment != '\0';
  app.set_config("--config", is_given ? from_environment : "",
                 "File of 'key = value' lines; flags and WALSH_… variables win over it",
                 /*config_required=*/is_given);
  app.config_formatter(std::make_shared<ConfigFile>(&app));
}

}  // namespace

std::optional<int> ParseCommandLine(CLI::App& app, int argc, const char* const* argv) {
  if (app.get_version_ptr() == nullptr) {
    app.set_version_flag("--version", std::string(Version()));
  }
  AddConfigFile(app);
  AddEnvironmentTwins(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kExitOk : kExitUsage;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return kExitUsage;
  }
  return std::nullopt;
}

}  // namespace walsh
