// What the standard streams are connected to.
#pragma once

namespace walsh::client {

bool IsTerminal(int fd);
// Columns of the terminal behind `fd`, else $COLUMNS, else 80.
int TerminalWidth(int fd);

}  // namespace walsh::client
