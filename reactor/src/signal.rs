//! The signals that a reactor can receive.

/// A signal that a service may watch; see [`Context::watch_signals`](crate::Context::watch_signals).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Signal {
    /// `SIGHUP`: the terminal was closed, or a service is to reload its configuration.
    Hangup,
    /// `SIGINT`: Ctrl-C.
    Interrupt,
    /// `SIGQUIT`: Ctrl-\.
    Quit,
    /// `SIGTERM`: the process is to terminate.
    Terminate,
    /// `SIGCHLD`: a child process has ended, or has been stopped or continued.
    Child,
    /// `SIGWINCH`: the terminal was resized.
    WindowChange,
    /// `SIGUSR1`.
    User1,
    /// `SIGUSR2`.
    User2,
}
