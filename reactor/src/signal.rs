//! The signals that a reactor can take delivery of.

/// A signal that a service may watch; see [`Context::watch_signals`](crate::Context::watch_signals).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Signal {
    /// `SIGHUP`: the terminal is gone, or a service is asked to read its configuration again.
    Hangup,
    /// `SIGINT`: Ctrl-C.
    Interrupt,
    /// `SIGQUIT`: Ctrl-\.
    Quit,
    /// `SIGTERM`: a polite request to end.
    Terminate,
    /// `SIGCHLD`: a child process has ended, or has been stopped or continued.
    Child,
    /// `SIGWINCH`: the terminal has another size.
    WindowChange,
    /// `SIGUSR1`.
    User1,
    /// `SIGUSR2`.
    User2,
}
