#include "worker/pipeline/rotated_source.h"

#include "common/check.h"
#include "common/status_macros.h"
#include "worker/rotate/fold.h"

namespace walsh::pipeline {

DenseLinear& Dense(const std::unique_ptr<Linear>& linear) {
  auto* dense = dynamic_cast<DenseLinear*>(linear.get());
  WALSH_CHECK(dense != nullptr);
  return *dense;
}

absl::StatusOr<Matrix> RotatedSource::Embedding() {
  WALSH_ASSIGN_OR_RETURN(Matrix embedding, original_.Embedding());
  rotate::RotateReader(embedding, {}, r1_, pool_);
  return embedding;
}

void RotatedSource::RotateLayer(DecoderLayer& layer) {
  DenseLinear& v = Dense(layer.v_proj);
  DenseLinear& o = Dense(layer.o_proj);
  DenseLinear& down = Dense(layer.down_proj);
  if (r1_.is_identity()) {
    rotate::RotateHeadOutputs(v.weights(), v.bias(), r2_, pool_);
    rotate::RotateHeadInputs(o.weights(), r2_, pool_);
  } else {
    rotate::FoldLayer(
        {layer.input_norm, layer.post_attention_norm, Dense(layer.q_proj).weights(),
         Dense(layer.k_proj).weights(), v.weights(), o.weights(), Dense(layer.gate_proj).weights(),
         Dense(layer.up_proj).weights(), down.weights(), v.bias(), o.bias(), down.bias()},
        r1_, r2_, pool_);
  }
  if (online_ == nullptr) return;
  rotate::RotateReader(down.weights(), {}, online_->down_rotation(), pool_);
  layer.online = online_;
}

absl::StatusOr<DecoderLayer> RotatedSource::Layer(int64_t index) {
  WALSH_ASSIGN_OR_RETURN(DecoderLayer layer, original_.Layer(index));
  RotateLayer(layer);
  return layer;
}

absl::StatusOr<std::vector<float>> RotatedSource::FinalNorm() {
  if (r1_.is_identity()) return original_.FinalNorm();
  return std::vector<float>();
}

absl::StatusOr<Matrix> RotatedSource::Head() {
  WALSH_ASSIGN_OR_RETURN(Matrix head, original_.Head());
  if (r1_.is_identity()) return head;
  WALSH_ASSIGN_OR_RETURN(const std::vector<float> final_norm, original_.FinalNorm());
  rotate::RotateReader(head, final_norm, r1_, pool_);
  return head;
}

}  // namespace walsh::pipeline
