// Durations on the wire.
#pragma once

#include "absl/time/time.h"
#include "google/protobuf/duration.pb.h"
#include "google/protobuf/timestamp.pb.h"

namespace walsh::service {

inline absl::Duration FromProto(const google::protobuf::Duration& d) {
  return absl::Seconds(d.seconds()) + absl::Nanoseconds(d.nanos());
}

inline google::protobuf::Duration ToProto(absl::Duration d) {
  google::protobuf::Duration proto;
  proto.set_seconds(absl::IDivDuration(d, absl::Seconds(1), &d));
  proto.set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(d)));
  return proto;
}

inline google::protobuf::Timestamp TimestampFromUnix(int64_t seconds) {
  google::protobuf::Timestamp proto;
  proto.set_seconds(seconds);
  return proto;
}

}  // namespace walsh::service
