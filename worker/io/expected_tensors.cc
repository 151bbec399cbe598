#include "worker/io/expected_tensors.h"

#include <set>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/io/checkpoint.h"

namespace walsh {
namespace {

struct Linear {
  std::string_view name;
  int64_t out = 0;
  int64_t in = 0;
};

std::vector<Linear> LayerLinears(const ModelConfig& c) {
  return {
      {"self_attn.q_proj", c.q_width(), c.hidden},  {"self_attn.k_proj", c.kv_width(), c.hidden},
      {"self_attn.v_proj", c.kv_width(), c.hidden}, {"self_attn.o_proj", c.hidden, c.q_width()},
      {"mlp.gate_proj", c.intermediate, c.hidden},  {"mlp.up_proj", c.intermediate, c.hidden},
      {"mlp.down_proj", c.hidden, c.intermediate}};
}

struct NormTensor {
  std::string_view suffix;
  int64_t size = 0;
};

std::vector<NormTensor> NormTensors(const ModelConfig& config) {
  std::vector<NormTensor> norms = {{"input_layernorm.weight", config.hidden},
                                   {"post_attention_layernorm.weight", config.hidden}};
  if (config.has_output_norms) {
    norms.push_back({"pre_feedforward_layernorm.weight", config.hidden});
    norms.push_back({"post_feedforward_layernorm.weight", config.hidden});
  }
  if (config.has_qk_norm) {
    norms.push_back({"self_attn.q_norm.weight", config.head_dim});
    norms.push_back({"self_attn.k_norm.weight", config.head_dim});
  }
  return norms;
}

ExpectedTensor Vector(std::string name, int64_t size) {
  return {.name = std::move(name), .rows = 1, .cols = size, .is_one_dimensional = true};
}

ExpectedTensor Norm(std::string name, int64_t size) {
  ExpectedTensor norm = Vector(std::move(name), size);
  norm.is_norm = true;
  return norm;
}

std::string Describe(int64_t rows, int64_t cols, bool is_one_dimensional) {
  return is_one_dimensional ? absl::StrCat("[", cols, "]")
                            : absl::StrCat("[", rows, ", ", cols, "]");
}

bool EndsWith(std::string_view text, std::string_view suffix) {
  return text.size() >= suffix.size() && text.substr(text.size() - suffix.size()) == suffix;
}

// A weight or bias of some layer: a name that may not be left out of the forward pass.
bool IsLayerParameter(std::string_view name) {
  return name.substr(0, 13) == "model.layers." &&
         (EndsWith(name, ".weight") || EndsWith(name, ".bias"));
}

}  // namespace

std::vector<ExpectedTensor> ExpectedTensors(const ModelConfig& config) {
  std::vector<ExpectedTensor> out;
  out.push_back(
      {.name = std::string(kEmbeddingTensor), .rows = config.vocab, .cols = config.hidden});
  for (int64_t layer = 0; layer < config.n_layers; ++layer) {
    for (const NormTensor& norm : NormTensors(config)) {
      out.push_back(Norm(LayerTensor(layer, norm.suffix), norm.size));
    }
    for (const Linear& linear : LayerLinears(config)) {
      const std::string name = LayerTensor(layer, linear.name);
      out.push_back({.name = name + ".weight", .rows = linear.out, .cols = linear.in});
      if (config.has_bias(linear.name)) out.push_back(Vector(name + ".bias", linear.out));
    }
  }
  out.push_back(Norm(std::string(kFinalNormTensor), config.hidden));
  if (!config.tied_embeddings) {
    out.push_back(
        {.name = std::string(kLmHeadTensor), .rows = config.vocab, .cols = config.hidden});
  }
  return out;
}

int64_t FusedTensor::rows() const {
  int64_t n = 0;
  for (const ExpectedTensor& part : parts) n += part.rows;
  return n;
}

std::vector<FusedTensor> FusedTensors(const ModelConfig& config) {
  std::vector<FusedTensor> out;
  if (!config.has_fused_linears) return out;
  for (int64_t layer = 0; layer < config.n_layers; ++layer) {
    const auto part = [&](std::string_view linear, int64_t rows) {
      return ExpectedTensor{
          .name = LayerTensor(layer, linear), .rows = rows, .cols = config.hidden};
    };
    out.push_back({.name = LayerTensor(layer, "self_attn.qkv_proj.weight"),
                   .parts = {part("self_attn.q_proj.weight", config.q_width()),
                             part("self_attn.k_proj.weight", config.kv_width()),
                             part("self_attn.v_proj.weight", config.kv_width())}});
    out.push_back({.name = LayerTensor(layer, "mlp.gate_up_proj.weight"),
                   .parts = {part("mlp.gate_proj.weight", config.intermediate),
                             part("mlp.up_proj.weight", config.intermediate)}});
  }
  return out;
}

absl::Status CheckTensors(const ModelConfig& config,
                          const std::map<std::string, TensorShape, std::less<>>& present) {
  std::set<std::string, std::less<>> expected_names;
  for (const ExpectedTensor& expected : ExpectedTensors(config)) {
    const auto it = present.find(expected.name);
    if (it == present.end()) {
      return absl::InvalidArgumentError(absl::StrCat("tensor '", expected.name, "' is missing"));
    }
    const TensorShape& shape = it->second;
    if (shape.rows != expected.rows || shape.cols != expected.cols ||
        shape.is_one_dimensional != expected.is_one_dimensional) {
      return absl::InvalidArgumentError(
          absl::StrCat("tensor '", expected.name, "' has shape ",
                       Describe(shape.rows, shape.cols, shape.is_one_dimensional),
                       ", the configuration implies ",
                       Describe(expected.rows, expected.cols, expected.is_one_dimensional)));
    }
    expected_names.insert(expected.name);
  }
  for (const auto& [name, shape] : present) {
    if (!IsLayerParameter(name) || expected_names.count(name) > 0) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "tensor '", name, "' is not part of the model that the configuration describes"));
  }
  return absl::OkStatus();
}

}  // namespace walsh
