#include "worker/service/disk_check.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/log.h"

namespace walsh::service {

absl::Status CheckDisk(std::string_view what, int64_t needed_bytes, int64_t free_bytes,
                       const std::string& directory) {
  if (needed_bytes <= free_bytes) return absl::OkStatus();
  free_bytes = std::max<int64_t>(free_bytes, 0);  // more may be promised than there is
  // Clients are not told paths.
  WALSH_LOG(Warning, "disk is short", {"what", what}, {"directory", directory},
            {"needed_bytes", needed_bytes}, {"free_bytes", free_bytes});
  absl::Status status = absl::ResourceExhaustedError(absl::StrCat(
      std::string(what), " needs ", needed_bytes, " bytes of disk, ", free_bytes, " are free"));
  SetErrorInfo(status, "INSUFFICIENT_DISK",
               {{"needed", absl::StrCat(needed_bytes)}, {"free", absl::StrCat(free_bytes)}});
  return status;
}

}  // namespace walsh::service
