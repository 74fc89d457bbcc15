//! What the command lines of both binaries share: one line for a wrong argument, and the log.

use std::io::Write;
use std::net::IpAddr;
use std::path::Path;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

/// Exit code: the target was reached, and everything asked for was verified.
pub const REACHED: u8 = 0;
/// Exit code: the run fell short, or the system refused what it takes to begin.
pub const SHORT: u8 = 1;
/// Exit code: wrong usage.
pub const USAGE: u8 = 2;

/// Reads the arguments of this process.
///
/// # Errors
/// The exit code, after the help or the version was printed (0), or one line on what is wrong (2).
pub fn parse<A: Parser>() -> Result<A, ExitCode> {
    A::try_parse().map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            ExitCode::from(REACHED)
        }
        _ => fail(USAGE, &usage_line::<A>(&error)),
    })
}

/// Prints one line on standard error, headed by the program's name.
pub fn fail(code: u8, line: &str) -> ExitCode {
    // The name need not be UTF-8, and `args` panics where it is not.
    let program = std::env::args_os().next().unwrap_or_default();
    let name = Path::new(&program).file_name().unwrap_or_default().display();
    let _ = writeln!(std::io::stderr(), "{name}: {line}");
    ExitCode::from(code)
}

/// Reads an IP address, for clap's `value_parser`.
///
/// # Errors
/// What is understood, and how a name is turned into an address.
pub fn parse_ip(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| {
        "no IP address; write it as 192.0.2.1 or 2001:db8::1 \
         (`getent hosts NAME` tells the address of a name)"
            .to_owned()
    })
}

/// Starts the log: plain lines on standard error, `info` and above unless `RUST_LOG` says otherwise.
pub fn start_log() {
    let default = env_logger::Env::default().default_filter_or("info");
    let _ = env_logger::Builder::from_env(default).format_target(false).try_init();
}

/// The first paragraph of clap's words in one line, and the usage.
///
/// clap explains over several lines; the first one says what is wrong, and the usage what is right.
pub fn usage_line<A: CommandFactory>(error: &clap::Error) -> String {
    let text = error.to_string();
    let paragraph: Vec<&str> =
        text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    let what = paragraph.join(" ");
    let what = what.strip_prefix("error: ").unwrap_or(&what);
    let usage = A::command().render_usage().to_string();
    format!("{what}; {}, and --help tells more", usage.trim().replacen("Usage", "usage", 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Parser)]
    #[command(name = "probe")]
    struct Probe {
        #[arg(long, value_parser = crate::quantity::parse_count)]
        ports: Option<u64>,
        #[arg(long)]
        needed: String,
    }

    #[test]
    fn a_wrong_argument_makes_one_line_with_reason_and_remedy() {
        for (arguments, reason) in [
            (vec!["probe", "--ports", "ten", "--needed", "x"], "ten"),
            (vec!["probe", "--nonsense"], "--nonsense"),
            (vec!["probe"], "--needed"),
        ] {
            let error = Probe::try_parse_from(arguments).expect_err("the arguments are wrong");
            let line = usage_line::<Probe>(&error);
            assert!(line.contains(reason) && line.contains("--help"), "{line}");
            assert!(!line.contains('\n'), "{line}");
        }
    }
}
