//! `c1000k-client`: see the library of the same name.

use std::process::ExitCode;

fn main() -> ExitCode {
    c1000k_client::run_command()
}
