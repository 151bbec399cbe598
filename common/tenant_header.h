// How the coordinator tells a worker whose request it sends on: as metadata of the call, which it
// writes itself and takes from no client. Absent: nobody's, as there are no API keys.
#pragma once

namespace walsh {

inline constexpr char kTenantHeader[] = "x-walsh-tenant";

}  // namespace walsh
