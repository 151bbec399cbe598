// Every numeric ceiling of the service, each with its reason.
//
// The coordinator checks them, and the worker checks them again.
#pragma once

#include <cstdint>

namespace walsh::limits {

// -- Messages and connections (docs/limits.md)
// gRPC's default; larger data never travels in a message.
inline constexpr int kMessageBytesMax = 4 << 20;
inline constexpr int kMetadataBytesMax = 8 << 10;
// Messages to clients are cut here, so that they fit the metadata beside rich details.
inline constexpr int kStatusMessageBytesMax = 1024;
// More streams than this on one connection need several connections.
inline constexpr int kConcurrentStreamsMax = 64;
// google.rpc.Status beside a code: in base64, with the message, it stays under kMetadataBytesMax.
inline constexpr int kStatusDetailsBytesMax = 3 << 10;
// What all connections of one server may buffer.
inline constexpr int64_t kGrpcBuffersBytesMax = 512 << 20;
inline constexpr int kHandshakeMsMax = 10'000;
inline constexpr int kConnectionIdleMsMax = 15 * 60 * 1000;
inline constexpr int kConnectionAgeMsMax = 60 * 60 * 1000;

// -- Security
// A file of certificates; a system's bundle of public CAs has about 200 KB.
inline constexpr int64_t kTlsFileBytesMax = 1 << 20;
// API keys and the daemons' token: not to be guessed, and beside other headers of a call.
inline constexpr int kSecretBytesMin = 16;
inline constexpr int kSecretBytesMax = 512;
inline constexpr int64_t kSecretsFileBytesMax = 64 << 10;
// Every call is compared with all of them.
inline constexpr int kApiKeysMax = 1000;
inline constexpr int64_t kApiKeysFileBytesMax = 1 << 20;
inline constexpr int kTenantBytesMax = 63;
// What a tenant's own limit may say; beyond it there is none.
inline constexpr int kTenantRequestsMax = 100'000;

// -- Generation
inline constexpr int64_t kPromptBytesMax = 1 << 20;
inline constexpr int kNewTokensMax = 32768;
inline constexpr int kNewTokensDefault = 256;
inline constexpr int kStopStringsMax = 16;
inline constexpr int kStopStringBytesMax = 64;
inline constexpr int kStopTokensMax = 64;
inline constexpr int kTopLogprobsMax = 20;
inline constexpr int kChatMessagesMax = 4096;
inline constexpr int kChatRoleBytesMax = 64;
inline constexpr double kTemperatureMax = 2.0;
inline constexpr double kRepetitionPenaltyMax = 10.0;
inline constexpr double kPenaltyAbsMax = 2.0;
// How long a request may run: without a deadline, and whatever its deadline says.
inline constexpr int kGenerateSecondsDefault = 10 * 60;
inline constexpr int kGenerateSecondsMax = 60 * 60;
// A stream's chunks that wait for a slow reader, and how long it may stall before it is ended.
inline constexpr int kStreamChunksMax = 256;
inline constexpr int kStreamStallSecondsMax = 30;
// The same chunks in bytes, on a worker; small ones are merged up to the second of these.
inline constexpr int64_t kStreamQueueBytesMax = 1 << 20;
inline constexpr int64_t kStreamMergedBytesMax = 32 << 10;
// Tokens of a stream that come faster than this share a message, unless a worker is told otherwise.
inline constexpr int kStreamIntervalMsDefault = 16;
// Requests whose text waits to become tokens, over all models of a worker.
inline constexpr int kPreparingRequestsMax = 256;

// -- Jobs
inline constexpr int kJobIdBytesMax = 63;
inline constexpr int kWorkerIdBytesMax = 128;
inline constexpr int kRequestIdBytesMax = 64;
inline constexpr int kModelNameBytesMax = 64;
inline constexpr int kDisplayNameBytesMax = 256;
inline constexpr int kLabelsMax = 64;
inline constexpr int kLabelBytesMax = 128;
inline constexpr int kPathBytesMax = 4096;
inline constexpr int kFileNameBytesMax = 255;
inline constexpr int kPageSizeDefault = 50;
inline constexpr int kPageSizeMax = 1000;
inline constexpr int kCalibrationSamplesMax = 8192;
inline constexpr int kSequenceLengthMin = 32;
inline constexpr int kSequenceLengthMax = 32768;
// Jobs that wait; more are refused at once instead of waiting for ever.
inline constexpr int kQueuedJobsMax = 10000;
// Retries of a failure that may pass (with backoff, about 35 minutes in all), before it is final.
inline constexpr int kJobRetriesMax = 10;
// Worker processes that died with the job: 3 on two workers or more, or 5 in all, make it POISONED.
inline constexpr int kJobCrashesOnTwoWorkersMax = 3;
inline constexpr int kJobCrashesMax = 5;
inline constexpr int kEvaluationWindowsMax = 8192;
// --override of one job, and the length of a pattern.
inline constexpr int kOverridesMax = 64;
inline constexpr int kOverridePatternBytesMax = 256;
inline constexpr int kPresetNameBytesMax = 64;
// Names of models that operators made; each request looks one up, each list of models shows all.
inline constexpr int kAliasesMax = 1000;
// Artifacts that quality gates refused, kept on a worker's disk; the oldest goes for a newer one.
inline constexpr int kRejectedArtifactsMax = 4;
// Of what is rounded at run time: a grid that reaches less of the largest value keeps nothing of
// it, and far less than this its step is no number above 0 any more.
inline constexpr double kClipRatioMin = 0.01;
inline constexpr int kRotationBlockMin = 16;
inline constexpr int kRotationBlockMax = 1 << 15;

// -- Evaluations of published models
// How long one may run: HellaSwag takes a small model hours on a CPU.
inline constexpr int kEvaluateSecondsMax = 24 * 60 * 60;
// That one worker runs at a time, beside its job and its traffic; more are refused.
inline constexpr int kEvaluationsMax = 1;
inline constexpr int kEvaluationTasksMax = 16;

// -- Files
inline constexpr int64_t kSafetensorsHeaderBytesMax = 32 << 20;
inline constexpr int kTensorsMax = 65536;
inline constexpr int kTensorNameBytesMax = 256;
inline constexpr int kTensorDimsMax = 8;
// Each shard of a checkpoint holds one file descriptor.
inline constexpr int kShardsMax = 1024;
// A shard has about 2 GB; a single tensor may need more.
inline constexpr int64_t kArtifactFileBytesMax = int64_t{1} << 40;
inline constexpr int64_t kJsonFileBytesMax = 64 << 20;
inline constexpr int kJsonDepthMax = 32;
inline constexpr int64_t kConfigFileBytesMax = 4 << 20;
inline constexpr int64_t kCalibrationFileBytesMax = 512 << 20;
// A zero-shot task's file, its items and their parts: HellaSwag, the largest, has 10,042 in 8 MB.
inline constexpr int64_t kTaskFileBytesMax = 64 << 20;
inline constexpr int64_t kTaskItemBytesMax = 256 << 10;
inline constexpr int kTaskItemsMax = 100'000;
inline constexpr int kTaskChoicesMax = 32;
inline constexpr int64_t kGgufStringBytesMax = 16 << 20;
inline constexpr int64_t kGgufArrayItemsMax = 4 << 20;
// Over all strings of one file's metadata.
inline constexpr int64_t kGgufTextBytesMax = 256 << 20;
// Over all arrays of one file: bounds the memory that its metadata takes.
inline constexpr int64_t kGgufItemsMax = 8 << 20;
inline constexpr int kGgufKeysMax = 65536;
inline constexpr int kGgufTensorDimsMax = 4;
inline constexpr int64_t kGgufAlignmentMax = 1 << 20;

// -- Models
inline constexpr int kVocabMax = 1 << 20;
inline constexpr int kLayersMax = 1024;
inline constexpr int kHiddenMax = 1 << 17;
inline constexpr int kIntermediateMax = 1 << 19;
inline constexpr int kHeadsMax = 4096;
inline constexpr int kHeadDimMax = 1024;
inline constexpr int kContextMax = 1 << 22;
// query_pre_attn_scalar: scores are divided by its root, which must leave numbers of them.
inline constexpr double kQueryPreAttentionScalarMin = 1.0;
inline constexpr double kQueryPreAttentionScalarMax = 1000000.0;

// -- Chat templates
inline constexpr int64_t kTemplateBytesMax = 256 << 10;
inline constexpr int64_t kTemplateOutputBytesMax = 4 << 20;
inline constexpr int64_t kTemplateStepsMax = 1'000'000;
inline constexpr int kTemplateDepthMax = 64;

}  // namespace walsh::limits
