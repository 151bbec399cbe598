#include "client/commands/chat.h"

#include <unistd.h>

#include <cstdio>

#include "client/commands/print_stream.h"
#include "client/commands/sampling_flags.h"
#include "client/resource_name.h"
#include "client/terminal/json_text.h"
#include "client/terminal/terminal.h"
#include "common/command_line.h"

namespace walsh::client {
namespace {

struct ChatFlags {
  std::string model;
  std::string message;
  std::string system;
  SamplingFlags sampling;
  bool raw = false;
  bool stats = false;
};

// One conversation with one model.
class Conversation {
 public:
  Conversation(Client& client, Interrupts& interrupts, const ChatFlags& flags)
      : client_(client), interrupts_(interrupts), flags_(flags) {
    request_.set_model(ResourceId(flags.model));
    Reset();
  }

  absl::Status SetSampling() {
    auto sampling = MakeSampling(flags_.sampling);
    if (sampling.ok()) *request_.mutable_sampling() = *std::move(sampling);
    return sampling.status();
  }

  void Reset() {
    request_.clear_messages();
    if (!flags_.system.empty()) Add("system", flags_.system);
  }

  // Sends a message and prints the answer. A turn that failed leaves no trace in the conversation.
  StreamOutcome Say(const std::string& text) {
    if (flags_.raw) {
      const v1::GenerateRequest request = RawRequest(text);
      return PrintStream(interrupts_, flags_.stats,
                         [&](const auto& on_event, Cancellation* cancellation) {
                           return client_.GenerateStream(request, on_event, cancellation);
                         });
    }
    Add("user", text);
    StreamOutcome outcome = PrintStream(
        interrupts_, flags_.stats, [&](const auto& on_event, Cancellation* cancellation) {
          return client_.ChatStream(request_, on_event, cancellation);
        });
    if (outcome.status.ok() || (outcome.cancelled && !outcome.text.empty())) {
      Add("assistant", outcome.text);
    } else {
      request_.mutable_messages()->RemoveLast();
    }
    return outcome;
  }

  // The whole answer at once.
  absl::StatusOr<v1::GenerateResponse> Ask(const std::string& text) {
    Cancellation cancellation;
    const Interrupts::Cancels cancels(interrupts_, cancellation);
    absl::StatusOr<v1::GenerateResponse> response;
    if (flags_.raw) {
      response = client_.Generate(RawRequest(text), &cancellation);
    } else {
      Add("user", text);
      response = client_.Chat(request_, &cancellation);
    }
    return response;
  }

 private:
  void Add(const std::string& role, const std::string& content) {
    v1::ChatMessage* message = request_.add_messages();
    message->set_role(role);
    message->set_content(content);
  }

  v1::GenerateRequest RawRequest(const std::string& text) const {
    v1::GenerateRequest request;
    request.set_model(request_.model());
    request.set_prompt(text);
    *request.mutable_sampling() = request_.sampling();
    return request;
  }

  Client& client_;
  Interrupts& interrupts_;
  const ChatFlags& flags_;
  v1::ChatRequest request_;
};

int TalkOnTerminal(Conversation& conversation, Interrupts& interrupts) {
  std::fputs("/reset forgets the conversation; Ctrl-C stops an answer; /exit or Ctrl-D leaves\n",
             stderr);
  while (true) {
    std::fputs("> ", stderr);
    std::string line;
    if (interrupts.ReadLine(&line) != Interrupts::Read::kLine || line == "/exit") {
      if (line != "/exit") std::fputc('\n', stderr);
      return kExitOk;
    }
    if (line.empty()) continue;
    if (line == "/reset") {
      conversation.Reset();
      continue;
    }
    if (absl::Status status = CheckUtf8(line, "message"); !status.ok()) {
      Fail(status);
      continue;
    }
    const StreamOutcome outcome = conversation.Say(line);
    if (!outcome.status.ok() && !outcome.cancelled) Fail(outcome.status);
  }
}

int RunChat(const ChatFlags& flags, const GlobalFlags& global) {
  Interrupts interrupts;
  Client client(MakeClientOptions(global));
  if (absl::Status status = CheckUtf8(flags.system, "system message"); !status.ok()) {
    return Fail(status);
  }
  Conversation conversation(client, interrupts, flags);
  if (absl::Status status = conversation.SetSampling(); !status.ok()) return Fail(status);
  if (flags.message.empty() && IsTerminal(STDIN_FILENO) && !global.json()) {
    return TalkOnTerminal(conversation, interrupts);
  }
  const auto message = TextOrStdin(flags.message.empty() ? "-" : flags.message, "message");
  if (!message.ok()) return Fail(message.status());
  if (global.json()) {
    const auto response = conversation.Ask(*message);
    if (!response.ok()) return Fail(response.status());
    PrintOut(JsonText(*response));
    return kExitOk;
  }
  const StreamOutcome outcome = conversation.Say(*message);
  return outcome.status.ok() ? kExitOk : Fail(outcome.status);
}

}  // namespace

void AddChatCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen) {
  auto flags = std::make_shared<ChatFlags>();
  CLI::App& command = *app.add_subcommand("chat", "Talk with a model");
  command.add_option("NAME", flags->model, "A loaded model")->required();
  command.add_option("--message", flags->message,
                     "One message instead of a conversation; without it standard input is read");
  command.add_option("--system", flags->system, "System message");
  AddSamplingFlags(command, flags->sampling);
  command.add_flag("--raw", flags->raw, "The text as it is: no chat template, no history");
  command.add_flag("--stats", flags->stats, "Print tokens per second to standard error");
  command.callback(
      [flags, &global, &chosen] { chosen = [flags, &global] { return RunChat(*flags, global); }; });
}

}  // namespace walsh::client
