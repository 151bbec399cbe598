// What a call needs of a connection to the service: a stub of each public service.
#pragma once

#include <grpcpp/channel.h>

#include <memory>
#include <utility>

#include "walsh/v1/evaluation.grpc.pb.h"
#include "walsh/v1/generation.grpc.pb.h"
#include "walsh/v1/model.grpc.pb.h"
#include "walsh/v1/quantization.grpc.pb.h"

namespace walsh::client {

struct Connection {
  explicit Connection(std::shared_ptr<grpc::Channel> c)
      : channel(std::move(c)),
        quantization(v1::QuantizationService::NewStub(channel)),
        models(v1::ModelService::NewStub(channel)),
        generation(v1::GenerationService::NewStub(channel)),
        evaluation(v1::EvaluationService::NewStub(channel)) {}

  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::QuantizationService::Stub> quantization;
  std::unique_ptr<v1::ModelService::Stub> models;
  std::unique_ptr<v1::GenerationService::Stub> generation;
  std::unique_ptr<v1::EvaluationService::Stub> evaluation;
};

}  // namespace walsh::client
