//! Arguments that both programs share, and the sources of arguments: the command line, or environment variables.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::sync::OnceLock;

use clap::builder::BoolishValueParser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgAction, Args, Command, CommandFactory, Parser, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;
use log::LevelFilter;

use super::{REACHED, SHORT, deliver, fail};

/// The prefix of environment variables for flags.
const ENVIRONMENT: &str = "C1000K_";

/// The verbosity and colours of the output.
#[derive(Args, Clone, Debug, Default, PartialEq)]
#[command(next_help_heading = "Output")]
pub struct OutputArgs {
    /// Print warnings and errors, but no progress; the summary is still printed
    #[arg(short, long, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Print decisions and their reasons; twice: in more detail
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,
    /// When to use colours; auto: on a terminal, unless NO_COLOR is set
    #[arg(long, value_enum, value_name = "WHEN", default_value_t, hide_possible_values = true)]
    pub color: Color,
    /// Print the man page, or the completions of a shell, and exit: man, bash, zsh, fish, elvish or powershell
    #[arg(long, value_enum, value_name = "WHAT", hide_possible_values = true)]
    pub generate: Option<Generated>,
}

/// When colours are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal, unless `NO_COLOR` is set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// What a program prints about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Generated {
    Man,
    Bash,
    Zsh,
    Fish,
    Elvish,
    Powershell,
}

static OUTPUT: OnceLock<OutputArgs> = OnceLock::new();

/// Whether progress is suppressed.
#[must_use]
pub fn is_quiet() -> bool {
    OUTPUT.get().is_some_and(|output| output.quiet)
}

/// The log filter without `RUST_LOG`.
pub(super) fn log_level() -> LevelFilter {
    match OUTPUT.get() {
        Some(OutputArgs { quiet: true, .. }) => LevelFilter::Warn,
        Some(OutputArgs { verbose: 1, .. }) => LevelFilter::Debug,
        Some(OutputArgs { verbose: 2.., .. }) => LevelFilter::Trace,
        _ => LevelFilter::Info,
    }
}

/// Whether standard error gets colours.
pub(super) fn wants_color() -> bool {
    match OUTPUT.get().map_or(Color::Auto, |output| output.color) {
        Color::Always => true,
        Color::Never => false,
        Color::Auto => {
            let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
            let has_style = std::env::var("RUST_LOG_STYLE").is_ok_and(|style| style != "auto");
            let is_dumb = std::env::var_os("TERM").is_none_or(|terminal| terminal == "dumb");
            !has_style && !is_dumb && !is_set("NO_COLOR") && io::stderr().is_terminal()
        }
    }
}

/// Sets the verbosity from here on.
///
/// # Errors
/// The exit code, after printing the generated text.
pub(super) fn apply<A: CommandFactory>(output: &OutputArgs) -> Result<(), ExitCode> {
    let _ = OUTPUT.set(output.clone());
    output.generate.map_or(Ok(()), |what| Err(generate(what, with_environment(A::command()))))
}

/// Parses the arguments, from the command line or the environment.
pub(super) fn read<A: Parser>() -> Result<A, clap::Error> {
    let mut command = with_environment(A::command());
    let matches = command
        .try_get_matches_from_mut(std::env::args_os())
        .map_err(|error| name_variable(error, &command))
        .map_err(|error| name_first_port(error, &command))?;
    A::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
}

/// Each flag, with or without a value, may also be set by a variable: `--hold 5m` by `C1000K_HOLD=5m`.
fn with_environment(command: Command) -> Command {
    let mut command = command.mut_args(|argument| {
        let Some(long) = argument.get_long() else { return argument };
        if argument.is_hide_set() || ["help", "version", "check", "generate"].contains(&long) {
            return argument;
        }
        let variable = format!("{ENVIRONMENT}{}", long.replace('-', "_").to_uppercase());
        let argument = argument.env(variable).hide_env(true);
        // A variable may also be yes, on or 1.
        match argument.get_action() {
            ArgAction::SetTrue => argument.value_parser(BoolishValueParser::new()),
            _ => argument,
        }
    });
    if command.get_arguments().any(|argument| argument.get_long() == Some("quiet")) {
        let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let environment = "\n\nEach flag may also be set by an environment variable, such as C1000K_HOLD=5m for --hold 5m.";
        command = command.after_help(after + environment);
    }
    command
}

/// Names the variable in an error about its value, which clap reports as one of the flag.
fn name_variable(mut error: clap::Error, command: &Command) -> clap::Error {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    let (Some(flag), Some(value)) =
        (text(ContextKind::InvalidArg), text(ContextKind::InvalidValue))
    else {
        return error;
    };
    let argument = command.get_arguments().find(|argument| argument.to_string() == flag);
    let variable = argument.and_then(|argument| argument.get_env());
    let Some(variable) = variable.filter(|&name| {
        let is_from_there = |found: OsString| {
            let found = found.to_string_lossy();
            found == value || found.split(',').any(|part| part == value)
        };
        let is_typed = |word: OsString| word.to_string_lossy().ends_with(&value);
        std::env::var_os(name).is_some_and(is_from_there) && !std::env::args_os().any(is_typed)
    }) else {
        return error;
    };
    let named = format!("{} ({flag})", variable.display());
    error.insert(ContextKind::InvalidArg, ContextValue::String(named));
    error
}

/// Names the flag for a port, which is an argument of the client and a flag of the server.
fn name_first_port(mut error: clap::Error, command: &Command) -> clap::Error {
    const FLAG: &str = "first-port";
    let port = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(word)) if error.kind() == ErrorKind::UnknownArgument => {
            word.parse::<u16>().ok()
        }
        _ => None,
    };
    let has_flag = command.get_arguments().any(|argument| argument.get_long() == Some(FLAG));
    if let Some(port) = port.filter(|_| has_flag) {
        let tip = format!("the first port is a flag: --{FLAG} {port}");
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    }
    error
}

fn generate(what: Generated, mut command: Command) -> ExitCode {
    let name = command.get_name().to_owned();
    let mut text = Vec::new();
    let shell = match what {
        Generated::Man => {
            if let Err(error) = Man::new(command).render(&mut text) {
                return fail(SHORT, &format!("the man page can't be made: {error}"));
            }
            return deliver(REACHED, &String::from_utf8_lossy(&text));
        }
        Generated::Bash => Shell::Bash,
        Generated::Zsh => Shell::Zsh,
        Generated::Fish => Shell::Fish,
        Generated::Elvish => Shell::Elvish,
        Generated::Powershell => Shell::PowerShell,
    };
    clap_complete::generate(shell, &mut command, name, &mut text);
    deliver(REACHED, &String::from_utf8_lossy(&text))
}
