#include "client/commands/tokenize.h"

#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/resource_name.h"
#include "client/terminal/json_text.h"
#include "client/terminal/safe_text.h"
#include "client/terminal/terminal.h"
#include "common/command_line.h"

namespace walsh::client {
namespace {

struct TokenizeFlags {
  std::string model;
  std::string text = "-";
  bool add_special_tokens = false;
};

struct DetokenizeFlags {
  std::string model;
  std::vector<int> token_ids;
  bool skip_special_tokens = false;
};

int RunTokenize(const TokenizeFlags& flags, const GlobalFlags& global) {
  Client client(MakeClientOptions(global));
  const auto text = TextOrStdin(flags.text, "text");
  if (!text.ok()) return Fail(text.status());
  v1::TokenizeRequest request;
  request.set_model(ResourceId(flags.model));
  request.set_text(*text);
  request.set_add_special_tokens(flags.add_special_tokens);
  const auto response = client.Tokenize(request);
  if (!response.ok()) return Fail(response.status());
  PrintOut(global.json() ? JsonText(*response)
                         : absl::StrCat(absl::StrJoin(response->token_ids(), " "), "\n"));
  return kExitOk;
}

int RunDetokenize(const DetokenizeFlags& flags, const GlobalFlags& global) {
  Client client(MakeClientOptions(global));
  v1::DetokenizeRequest request;
  request.set_model(ResourceId(flags.model));
  for (const int id : flags.token_ids) request.add_token_ids(id);
  request.set_skip_special_tokens(flags.skip_special_tokens);
  const auto response = client.Detokenize(request);
  if (!response.ok()) return Fail(response.status());
  if (global.json()) {
    PrintOut(JsonText(*response));
  } else {
    PrintOut((IsTerminal(STDOUT_FILENO) ? SafeText(response->text()) : response->text()) + "\n");
  }
  return kExitOk;
}

}  // namespace

void AddTokenizeCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen) {
  auto flags = std::make_shared<TokenizeFlags>();
  CLI::App& command = *app.add_subcommand("tokenize", "Show the token ids of a text");
  command.add_option("NAME", flags->model, "A loaded model")->required();
  command.add_option("TEXT", flags->text, "The text; - or nothing reads standard input");
  command.add_flag("--add-special-tokens", flags->add_special_tokens,
                   "With the BOS and EOS tokens that the model's tokenizer adds");
  command.callback([flags, &global, &chosen] {
    chosen = [flags, &global] { return RunTokenize(*flags, global); };
  });
}

void AddDetokenizeCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen) {
  auto flags = std::make_shared<DetokenizeFlags>();
  CLI::App& command = *app.add_subcommand("detokenize", "Show the text of token ids");
  command.add_option("NAME", flags->model, "A loaded model")->required();
  command.add_option("ID", flags->token_ids, "Token ids")->required();
  command.add_flag("--skip-special-tokens", flags->skip_special_tokens,
                   "Leave special tokens out of the text");
  command.callback([flags, &global, &chosen] {
    chosen = [flags, &global] { return RunDetokenize(*flags, global); };
  });
}

}  // namespace walsh::client
