#include "client/commands/models.h"

#include <unistd.h>

#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client/resource_name.h"
#include "client/terminal/interrupts.h"
#include "client/terminal/json_text.h"
#include "client/terminal/quantities.h"
#include "client/terminal/safe_text.h"
#include "client/terminal/table.h"
#include "common/command_line.h"

namespace walsh::client {
namespace {

struct ModelsFlags {
  std::string name;
  std::string model;  // that an alias points at
  bool force = false;
  std::string format;
  std::string dtype = "bf16";
  std::string output_dir;
  std::string source;
};

const std::map<std::string, v1::ExportModelRequest::Format>& Formats() {
  static const auto* const formats = new std::map<std::string, v1::ExportModelRequest::Format>{
      {"dequantized", v1::ExportModelRequest::DEQUANTIZED},
      {"gptq_v2", v1::ExportModelRequest::GPTQ_V2},
      {"gptq", v1::ExportModelRequest::GPTQ},
      {"compressed-tensors", v1::ExportModelRequest::COMPRESSED_TENSORS},
      {"gguf", v1::ExportModelRequest::GGUF}};
  return *formats;
}

const std::map<std::string, v1::ExportModelRequest::DataType>& DataTypes() {
  static const auto* const types = new std::map<std::string, v1::ExportModelRequest::DataType>{
      {"bf16", v1::ExportModelRequest::BFLOAT16},
      {"fp16", v1::ExportModelRequest::FLOAT16},
      {"fp32", v1::ExportModelRequest::FLOAT32}};
  return *types;
}

template <typename Value>
std::vector<std::string> Names(const std::map<std::string, Value>& values) {
  std::vector<std::string> names;
  for (const auto& [name, value] : values) names.push_back(name);
  return names;
}

// "exporting   12/30", redrawn on a terminal; a pipe gets the result only.
class ConversionLine {
 public:
  explicit ConversionLine(const char* verb) : verb_(verb), redraws_(isatty(fileno(stderr)) != 0) {}
  ~ConversionLine() {
    if (is_drawn_) std::fputs("\r\033[K", stderr);
  }
  ConversionLine(const ConversionLine&) = delete;
  ConversionLine& operator=(const ConversionLine&) = delete;

  void Show(const v1::ConversionProgress& progress) {
    if (!redraws_) return;
    // Before the first tensor files are compared with their digests.
    const std::string text =
        progress.tensors_done() == 0
            ? std::string("checking files")
            : absl::StrFormat("%s  tensor %d/%d", verb_, progress.tensors_done(),
                              progress.tensors_total());
    std::fprintf(stderr, "\r\033[K%s", text.c_str());
    std::fflush(stderr);
    is_drawn_ = true;
  }

 private:
  const char* const verb_;
  const bool redraws_;
  bool is_drawn_ = false;
};

std::string PerplexityText(double perplexity) {
  return perplexity > 0 ? SignificantText(perplexity, 5) : "";
}

std::string GroupText(int group_size) {
  return group_size < 0 ? "channel" : absl::StrCat(group_size);
}

// "2", "2/4" where overrides gave some linears 4, "2 A4 KV4" with rounding at run time.
std::string BitsText(const v1::Model& model) {
  std::string text = absl::StrCat(model.bits());
  for (const int bits : model.override_bits()) absl::StrAppend(&text, "/", bits);
  if (model.activation_bits() > 0) absl::StrAppend(&text, " A", model.activation_bits());
  if (model.kv_cache_bits() > 0) absl::StrAppend(&text, " KV", model.kv_cache_bits());
  return text;
}

// "2 (4 and 8 in some linears), 2.81 a weight, codebooks, group 64, gptq, rotation gsr"
std::string RecipeText(const v1::Model& model) {
  std::string text = absl::StrCat(model.bits());
  if (model.override_bits_size() > 0) {
    absl::StrAppend(&text, " (", absl::StrJoin(model.override_bits(), " and "),
                    " in some linears)");
  }
  if (model.bits_per_weight() > 0) {
    absl::StrAppend(&text, ", ", SignificantText(model.bits_per_weight(), 3), " a weight");
  }
  if (model.grid() == "codebook") text += ", codebooks";
  if (model.grid() == "float-zero") text += ", float zeros";
  absl::StrAppend(&text, ", group ", GroupText(model.group_size()), ", ", model.method(),
                  ", rotation ", model.rotation());
  return text;
}

std::string RunTimeText(const v1::Model& model) {
  std::vector<std::string> parts;
  if (model.activation_bits() > 0) {
    parts.push_back(absl::StrCat("activations ", model.activation_bits(), " bits"));
  }
  if (model.kv_cache_bits() > 0) {
    parts.push_back(absl::StrCat("KV cache ", model.kv_cache_bits(), " bits"));
  }
  return absl::StrJoin(parts, ", ");
}

std::string ModelTable(const v1::ListModelsResponse& response) {
  Table table({{"MODEL"},
               {"STATE"},
               {"BITS", Align::kRight},
               {"GROUP", Align::kRight},
               {"ROTATION"},
               {"METHOD"},
               {"SIZE", Align::kRight},
               {"PERPLEXITY", Align::kRight},
               {"BEFORE", Align::kRight},
               {"WORKER"},
               {"ALIASES"}});
  for (const auto& model : response.models()) {
    table.AddRow({ResourceId(model.name()), v1::Model::State_Name(model.state()), BitsText(model),
                  GroupText(model.group_size()), model.rotation(), model.method(),
                  BytesText(model.size_bytes()), PerplexityText(model.perplexity_after()),
                  PerplexityText(model.perplexity_before()), ResourceId(model.worker()),
                  absl::StrJoin(model.aliases(), ", ")});
  }
  return table.Text();
}

std::string ModelPage(const v1::Model& model) {
  std::string text = absl::StrCat("model ", ResourceId(model.name()), ": ",
                                  v1::Model::State_Name(model.state()), "\n");
  const auto fact = [&text](const char* label, const std::string& value) {
    if (!value.empty()) absl::StrAppendFormat(&text, "  %-14s %s\n", label, value);
  };
  fact("aliases", absl::StrJoin(model.aliases(), ", "));
  fact("architecture", model.architecture());
  fact("bits", RecipeText(model));
  fact("at run time", RunTimeText(model));
  fact("size",
       absl::StrCat(
           BytesText(model.size_bytes()),
           model.memory_bytes() > 0 ? ", in memory " + BytesText(model.memory_bytes()) : ""));
  fact("context", absl::StrCat(CountText(model.max_model_len()), " tokens"));
  if (model.perplexity_after() > 0) {
    fact("perplexity", absl::StrCat(PerplexityText(model.perplexity_before()), " before, ",
                                    PerplexityText(model.perplexity_after()), " after"));
  }
  fact("made by", ResourceId(model.quantization_job()));
  fact("created", TimeText(model.create_time()));
  fact("worker", ResourceId(model.worker()));
  fact("sha256", model.sha256());
  if (model.error().code() != 0) fact("last load", model.error().message());
  return SafeText(text);
}

int PrintModel(const absl::StatusOr<v1::Model>& model, const GlobalFlags& global) {
  if (!model.ok()) return Fail(model.status());
  PrintOut(global.json() ? JsonText(*model) : ModelPage(*model));
  return kExitOk;
}

int RunList(const ModelsFlags& /*flags*/, const GlobalFlags& global) {
  Client client(MakeClientOptions(global));
  const auto response = client.ListModels();
  if (!response.ok()) return Fail(response.status());
  if (global.json()) {
    PrintOut(JsonText(*response));
  } else if (response->models().empty()) {
    std::fputs("no models; make one with `walsh quantize`\n", stderr);
  } else {
    PrintOut(ModelTable(*response));
  }
  return kExitOk;
}

int RunGet(const ModelsFlags& flags, const GlobalFlags& global) {
  Client client(MakeClientOptions(global));
  return PrintModel(client.GetModel(flags.name), global);
}

// Moves a model while Ctrl-C can end the wait for it.
absl::StatusOr<v1::Model> Move(const ModelsFlags& flags, const GlobalFlags& global,
                               absl::StatusOr<v1::Model> (Client::*move)(const std::string&,
                                                                         Cancellation*)) {
  Interrupts interrupts;
  Client client(MakeClientOptions(global));
  Cancellation cancellation;
  const Interrupts::Cancels cancels(interrupts, cancellation);
  absl::StatusOr<v1::Model> model = (client.*move)(flags.name, &cancellation);
  if (absl::IsCancelled(model.status())) {
    return absl::CancelledError(absl::StrCat("interrupted; the worker ends what it has begun, `",
                                             WalshCommand(global), " models get ",
                                             ResourceId(flags.name), "` tells"));
  }
  return model;
}

int RunLoad(const ModelsFlags& flags, const GlobalFlags& global) {
  return PrintModel(Move(flags, global, &Client::LoadModel), global);
}

int RunUnload(const ModelsFlags& flags, const GlobalFlags& global) {
  return PrintModel(Move(flags, global, &Client::UnloadModel), global);
}

int RunAlias(const ModelsFlags& flags, const GlobalFlags& global) {
  Client client(MakeClientOptions(global));
  const auto alias = client.SetModelAlias(flags.name, flags.model, flags.force);
  if (!alias.ok()) return Fail(alias.status());
  PrintOut(global.json() ? JsonText(*alias)
                         : SafeText(absl::StrCat("alias ", ResourceId(alias->name()), ": ",
                                                 ResourceId(alias->model()), "\n")));
  return kExitOk;
}

int RunUnalias(const ModelsFlags& flags, const GlobalFlags& global) {
  Client client(MakeClientOptions(global));
  const absl::Status status = client.DeleteModelAlias(flags.name);
  return status.ok() ? kExitOk : Fail(status);
}

int RunDelete(const ModelsFlags& flags, const GlobalFlags& global) {
  Interrupts interrupts;
  Client client(MakeClientOptions(global));
  Cancellation cancellation;
  const Interrupts::Cancels cancels(interrupts, cancellation);
  const absl::Status status = client.DeleteModel(flags.name, flags.force, &cancellation);
  return status.ok() ? kExitOk : Fail(status);
}

std::string ExportPage(const ModelsFlags& flags, const v1::ModelExport& done) {
  std::string text =
      absl::StrCat("exported ", ResourceId(flags.name), " as ", flags.format, " to ",
                   done.directory(), "\n  ", done.files_size(), " files, ",
                   BytesText(done.size_bytes()), ", on ", ResourceId(done.worker()), "\n");
  for (const std::string& warning : done.warnings()) {
    absl::StrAppend(&text, "  warning: ", warning, "\n");
  }
  return SafeText(text);
}

int RunExport(const ModelsFlags& flags, const GlobalFlags& global) {
  v1::ExportModelRequest request;
  request.set_name(flags.name);
  request.set_format(Formats().at(flags.format));
  request.set_data_type(DataTypes().at(flags.dtype));
  request.set_output(flags.output_dir);
  Interrupts interrupts;
  Client client(MakeClientOptions(global));
  Cancellation cancellation;
  const Interrupts::Cancels cancels(interrupts, cancellation);
  absl::StatusOr<v1::ModelExport> done;
  {
    ConversionLine line("exporting");
    done = client.ExportModel(
        request, [&](const auto& progress) { line.Show(progress); }, &cancellation);
  }
  if (!done.ok()) return Fail(done.status());
  PrintOut(global.json() ? JsonText(*done) : ExportPage(flags, *done));
  return kExitOk;
}

int RunImport(const ModelsFlags& flags, const GlobalFlags& global) {
  v1::ImportModelRequest request;
  request.set_source_model(SourceReference(flags.source));
  request.set_model_name(flags.name);
  Interrupts interrupts;
  Client client(MakeClientOptions(global));
  Cancellation cancellation;
  const Interrupts::Cancels cancels(interrupts, cancellation);
  absl::StatusOr<v1::Model> model;
  {
    ConversionLine line("importing");
    model = client.ImportModel(
        request, [&](const auto& progress) { line.Show(progress); }, &cancellation);
  }
  return PrintModel(model, global);
}

}  // namespace

void AddModelsCommand(CLI::App& app, const GlobalFlags& global, Chosen& chosen) {
  auto flags = std::make_shared<ModelsFlags>();
  CLI::App& models = *app.add_subcommand("models", "Published models");
  models.require_subcommand(1);
  const auto add = [&](const char* name, const char* help,
                       int (*run)(const ModelsFlags&, const GlobalFlags&)) -> CLI::App& {
    CLI::App& command = *models.add_subcommand(name, help);
    command.callback([flags, run, &global, &chosen] {
      chosen = [flags, run, &global] { return run(*flags, global); };
    });
    return command;
  };
  add("list", "List models", RunList);
  add("get", "Show a model", RunGet).add_option("NAME", flags->name)->required();
  add("load", "Load a model, so that it serves", RunLoad)
      .add_option("NAME", flags->name)
      ->required();
  add("unload", "Unload a model; running requests have the worker's --shutdown-timeout to finish",
      RunUnload)
      .add_option("NAME", flags->name)
      ->required();
  CLI::App& alias = add("alias", "Point an alias at a model, from the next request on", RunAlias);
  alias.add_option("NAME", flags->name, "Of the alias, which is made if there is none")->required();
  alias.add_option("MODEL", flags->model, "That requests to NAME are answered by")->required();
  alias.add_flag("--force", flags->force,
                 "Also at a model that is not READY: requests are refused until it is");
  alias.footer(
      "Requests that were accepted before end with the model that they began with. An alias stands "
      "wherever a\nmodel is used (generate, chat, tokenize, bench, eval, get, export); load, "
      "unload "
      "and delete take models.");
  add("unalias", "Remove an alias; the model stays", RunUnalias)
      .add_option("NAME", flags->name)
      ->required();
  CLI::App& remove = add("delete", "Delete a model's files", RunDelete);
  remove.add_option("NAME", flags->name)->required();
  remove.add_flag("--force", flags->force, "Unload it first");
  CLI::App& do_export =
      add("export", "Write a model in the format of another program, on the worker that has it",
          RunExport);
  do_export.add_option("NAME", flags->name)->required();
  do_export
      .add_option(
          "--format", flags->format,
          "dequantized: a plain checkpoint; gptq_v2, gptq: GPTQ, the latter without zeros of "
          "0; compressed-tensors: 4 and 8 bits; gguf: 4 and 8 bits, symmetric")
      ->required()
      ->check(CLI::IsMember(Names(Formats())));
  do_export
      .add_option("--dtype", flags->dtype,
                  "Of all weights (dequantized), or of embeddings and head (gguf)")
      ->check(CLI::IsMember(Names(DataTypes())))
      ->capture_default_str();
  do_export.add_option("--output-dir", flags->output_dir,
                       "Folder beneath the worker's folder of exports; NAME-FORMAT by default");
  do_export.footer(
      "The folder is beneath the worker's --export-root, by default exports in its data folder. "
      "walsh does\nnot read it again: remove it when it is no longer wanted.");
  CLI::App& import =
      add("import", "Make a model of a GPTQ checkpoint that another program quantized", RunImport);
  import
      .add_option("MODEL", flags->source,
                  "Folder under a model root of the worker, or s3:// URL beneath a prefix of it")
      ->required();
  import.add_option("--name", flags->name, "Of the model that is made")->required();
}

}  // namespace walsh::client
