//! What a server makes of a WebSocket's bytes. Nothing here knows of TLS or of sockets.

use std::io::Cursor;
use std::mem;
use std::sync::Arc;

use tungstenite::handshake::machine::TryParse;
use tungstenite::handshake::server::{Request, create_response, write_response};
use tungstenite::protocol::frame::FrameHeader;
use tungstenite::protocol::frame::coding::{CloseCode, Control, Data, OpCode};

const HEAD_BYTES_MAX: usize = 8 * 1024;
/// Of a text, and so of each frame.
const TEXT_BYTES_MAX: usize = 64 * 1024;

/// A WebSocket that has nothing under way is empty.
#[derive(Default)]
pub(crate) struct WebSocket {
    is_open: bool,
    /// The beginning of a head or of a frame.
    rest: Vec<u8>,
    /// A text whose last fragment has not come.
    text: Option<Vec<u8>>,
}

/// The peer has ended it, or has to be let go: the goodbye, if there is one, has been written.
pub(crate) struct Ended;

impl WebSocket {
    pub(crate) fn is_open(&self) -> bool {
        self.is_open
    }

    /// Takes what has arrived: adds whole texts, as frames that anyone can be sent, to `texts`, and what is to be answered
    /// to `out`.
    pub(crate) fn receive(
        &mut self,
        bytes: &mut [u8],
        texts: &mut Vec<Arc<[u8]>>,
        out: &mut Vec<u8>,
    ) -> Result<(), Ended> {
        if self.rest.is_empty() {
            let used = self.take_all(bytes, texts, out)?;
            self.rest = bytes[used..].to_vec();
        } else {
            let mut all = mem::take(&mut self.rest);
            all.extend_from_slice(bytes);
            let used = self.take_all(&mut all, texts, out)?;
            if used < all.len() {
                all.drain(..used);
                self.rest = all;
            }
        }
        Ok(())
    }

    /// How many bytes were whole.
    fn take_all(
        &mut self,
        bytes: &mut [u8],
        texts: &mut Vec<Arc<[u8]>>,
        out: &mut Vec<u8>,
    ) -> Result<usize, Ended> {
        let mut used = 0;
        if !self.is_open {
            match Request::try_parse(bytes) {
                Ok(Some((length, request))) => {
                    let response = create_response(&request).map_err(|_| bad_request(out))?;
                    write_response(&mut *out, &response).map_err(|_| Ended)?;
                    (self.is_open, used) = (true, length);
                }
                Ok(None) if bytes.len() <= HEAD_BYTES_MAX => return Ok(0),
                _ => return Err(bad_request(out)),
            }
        }
        while let Some((header, begins, ends)) = next_frame(&bytes[used..], out)? {
            let payload = &mut bytes[used..][begins..ends];
            let mask = header.mask.unwrap_or_default();
            payload.iter_mut().zip(mask.iter().cycle()).for_each(|(byte, key)| *byte ^= key);
            self.take_frame(&header, payload, texts, out)?;
            used += ends;
        }
        Ok(used)
    }

    fn take_frame(
        &mut self,
        header: &FrameHeader,
        payload: &[u8],
        texts: &mut Vec<Arc<[u8]>>,
        out: &mut Vec<u8>,
    ) -> Result<(), Ended> {
        let mut text = match header.opcode {
            OpCode::Data(Data::Text) if self.text.is_none() => Vec::new(),
            OpCode::Data(Data::Continue) => {
                self.text.take().ok_or_else(|| close(CloseCode::Protocol, out))?
            }
            OpCode::Data(Data::Binary) => return Err(close(CloseCode::Unsupported, out)),
            OpCode::Control(_) if !header.is_final || payload.len() > 125 => {
                return Err(close(CloseCode::Protocol, out));
            }
            OpCode::Control(Control::Ping) => {
                write_frame(OpCode::Control(Control::Pong), payload, out);
                return Ok(());
            }
            OpCode::Control(Control::Pong) => return Ok(()),
            OpCode::Control(Control::Close) => {
                write_frame(OpCode::Control(Control::Close), payload.get(..2).unwrap_or(&[]), out);
                return Err(Ended);
            }
            _ => return Err(close(CloseCode::Protocol, out)),
        };
        if text.len() + payload.len() > TEXT_BYTES_MAX {
            return Err(close(CloseCode::Size, out));
        }
        text.extend_from_slice(payload);
        if !header.is_final {
            self.text = Some(text);
        } else if std::str::from_utf8(&text).is_ok() {
            let mut frame = Vec::new();
            write_frame(OpCode::Data(Data::Text), &text, &mut frame);
            texts.push(frame.into());
        } else {
            return Err(close(CloseCode::Invalid, out));
        }
        Ok(())
    }
}

/// The first frame, if it is whole, and where its payload begins and ends.
fn next_frame(
    bytes: &[u8],
    out: &mut Vec<u8>,
) -> Result<Option<(FrameHeader, usize, usize)>, Ended> {
    let mut cursor = Cursor::new(bytes);
    let parsed = FrameHeader::parse(&mut cursor).map_err(|_| close(CloseCode::Protocol, out))?;
    let Some((header, length)) = parsed else { return Ok(None) };
    let is_extended = header.rsv1 || header.rsv2 || header.rsv3;
    if header.mask.is_none() || is_extended {
        return Err(close(CloseCode::Protocol, out));
    }
    let length = usize::try_from(length).ok().filter(|&length| length <= TEXT_BYTES_MAX);
    let length = length.ok_or_else(|| close(CloseCode::Size, out))?;
    let begins = cursor.position() as usize;
    Ok((bytes.len() - begins >= length).then_some((header, begins, begins + length)))
}

fn bad_request(out: &mut Vec<u8>) -> Ended {
    let refusal = "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    out.extend_from_slice(refusal.as_bytes());
    Ended
}

/// A goodbye with its reason.
pub(crate) fn close(code: CloseCode, out: &mut Vec<u8>) -> Ended {
    write_frame(OpCode::Control(Control::Close), &u16::from(code).to_be_bytes(), out);
    Ended
}

pub(crate) fn ping(out: &mut Vec<u8>) {
    write_frame(OpCode::Control(Control::Ping), &[], out);
}

fn write_frame(opcode: OpCode, payload: &[u8], out: &mut Vec<u8>) {
    let header = FrameHeader { opcode, ..FrameHeader::default() };
    // Into a Vec it can always be written.
    let _ = header.format(payload.len() as u64, out);
    out.extend_from_slice(payload);
}
