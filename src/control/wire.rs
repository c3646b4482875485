//! QMP's framing: a stream of JSON values in, one line of ASCII JSON ended by CRLF out.
//!
//! In: values need no separator, and strings may stand in `'single quotes'`. A control character where JSON allows none,
//! or a 0xFF byte (never part of UTF-8), drops what was begun: this is how a client finds its feet again. One piece of rubbish
//! gives one error. Nothing is kept beyond a limit.

use std::io;

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{CharEscape, Formatter, Serializer};

/// The longest command that is taken. QMP commands are a few hundred bytes.
pub const MESSAGE_BYTES_MAX: usize = 256 * 1024;
/// How deep objects and arrays may nest; serde_json stops at 128.
const DEPTH_MAX: usize = 64;

/// What the stream held next.
#[derive(Clone, Debug, PartialEq)]
pub enum Incoming {
    /// A whole JSON value.
    Message(Value),
    /// Something that is no JSON, with the text for the client. The stream is usable again after it.
    Rubbish(String),
}

/// Where the decoder is between two bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    /// Between messages.
    Between,
    /// In an object or array.
    Structure,
    /// In a string that this quote ends; whether the last byte was a backslash.
    Text { quote: u8, escaped: bool },
    /// In a number or word outside of any structure.
    Word,
    /// After rubbish: up to a line's end or the start of a structure, without another error.
    Skip,
    /// After a message that was too large: up to a line's end.
    SkipLine,
}

/// Cuts a byte stream into messages.
#[derive(Debug)]
pub struct Decoder {
    place: Place,
    depth: usize,
    /// The message so far, with its strings in double quotes.
    text: Vec<u8>,
    bytes_max: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Decoder::with_limit(MESSAGE_BYTES_MAX)
    }
}

impl Decoder {
    /// A decoder that refuses messages of more than `bytes_max`.
    pub fn with_limit(bytes_max: usize) -> Self {
        Decoder { place: Place::Between, depth: 0, text: Vec::new(), bytes_max }
    }

    /// Takes bytes from the stream and hands each complete message to `sink`, in order.
    pub fn push(&mut self, bytes: &[u8], mut sink: impl FnMut(Incoming)) {
        for &byte in bytes {
            if self.place == Place::Word && b" \t\r\n{}[],:'\"".contains(&byte) {
                sink(self.complete());
            }
            if let Some(incoming) = self.step(byte) {
                sink(incoming);
            }
        }
    }

    fn step(&mut self, byte: u8) -> Option<Incoming> {
        let blank = matches!(byte, b' ' | b'\t' | b'\r' | b'\n');
        match self.place {
            Place::SkipLine => {
                if is_reset(byte) || byte == b'\n' {
                    self.place = Place::Between;
                }
                return None;
            }
            Place::Skip => match byte {
                b'{' | b'[' => self.place = Place::Between,
                b'\n' | b'\r' => {
                    self.place = Place::Between;
                    return None;
                }
                _ => return None,
            },
            Place::Text { .. } if byte < 0x20 => {
                return Some(self.reject("JSON parse error, control character in string"));
            }
            _ => {}
        }
        if is_reset(byte) {
            return Some(self.reject(&format!("JSON parse error, stray '\\x{byte:02x}'")));
        }
        if self.place != Place::Between && self.text.len() >= self.bytes_max {
            let rejected = self.reject("JSON message size limit exceeded");
            self.place = Place::SkipLine;
            return Some(rejected);
        }
        match self.place {
            Place::Text { quote, escaped } => self.text_step(byte, quote, escaped),
            Place::Structure => self.structure_step(byte),
            Place::Word => {
                self.text.push(byte);
                None
            }
            _ if blank => None,
            _ => match byte {
                b'{' | b'[' => {
                    self.place = Place::Structure;
                    self.structure_step(byte)
                }
                b'"' | b'\'' => {
                    self.text.push(b'"');
                    self.place = Place::Text { quote: byte, escaped: false };
                    None
                }
                b'0'..=b'9' | b'-' | b'a'..=b'z' | b'A'..=b'Z' => {
                    self.text.push(byte);
                    self.place = Place::Word;
                    None
                }
                _ => Some(self.reject("JSON parse error, expecting value")),
            },
        }
    }

    fn structure_step(&mut self, byte: u8) -> Option<Incoming> {
        match byte {
            b'{' | b'[' => {
                self.depth += 1;
                if self.depth > DEPTH_MAX {
                    let rejected = self.reject("JSON nesting depth limit exceeded");
                    self.place = Place::SkipLine;
                    return Some(rejected);
                }
            }
            b'}' | b']' => self.depth -= 1,
            b'"' | b'\'' => {
                self.text.push(b'"');
                self.place = Place::Text { quote: byte, escaped: false };
                return None;
            }
            _ => {}
        }
        self.text.push(byte);
        (self.depth == 0).then(|| self.complete())
    }

    fn text_step(&mut self, byte: u8, quote: u8, escaped: bool) -> Option<Incoming> {
        let mut still_escaped = false;
        match byte {
            _ if escaped => {
                // JSON knows no \'; the backslash was kept back until it was seen what it is for.
                if byte != b'\'' {
                    self.text.push(b'\\');
                }
                self.text.push(byte);
            }
            b'\\' => still_escaped = true,
            _ if byte == quote => {
                self.text.push(b'"');
                if self.depth == 0 {
                    return Some(self.complete());
                }
                self.place = Place::Structure;
                return None;
            }
            b'"' => self.text.extend_from_slice(b"\\\""),
            _ => self.text.push(byte),
        }
        self.place = Place::Text { quote, escaped: still_escaped };
        None
    }

    fn reject(&mut self, why: &str) -> Incoming {
        self.text.clear();
        self.depth = 0;
        self.place = Place::Skip;
        Incoming::Rubbish(why.to_owned())
    }

    fn complete(&mut self) -> Incoming {
        let text = std::mem::take(&mut self.text);
        self.depth = 0;
        self.place = Place::Between;
        let Ok(text) = std::str::from_utf8(&text) else {
            return Incoming::Rubbish("JSON parse error, invalid UTF-8 sequence in string".to_owned());
        };
        match serde_json::from_str(text) {
            Ok(value) => Incoming::Message(value),
            Err(error) => Incoming::Rubbish(format!("JSON parse error, {}", parse_complaint(&error))),
        }
    }
}

/// Bytes that reset the parser wherever they stand.
fn is_reset(byte: u8) -> bool {
    byte == 0xFF || byte == 0xFE || (byte < 0x20 && !matches!(byte, b'\t' | b'\r' | b'\n'))
}

/// What serde_json says, without its position, and with QEMU's word where the two say the same.
fn parse_complaint(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let text = text.split(" at line ").next().unwrap_or_default();
    match text {
        "expected value" | "expected ident" | "trailing comma" => "expecting value".to_owned(),
        "key must be a string" => "key is not a string in object".to_owned(),
        other => other.to_owned(),
    }
}

/// One message as it goes out: ASCII, `", "` and `": "` between members as QEMU prints them, CRLF at the end.
pub fn encode(message: &impl Serialize) -> Vec<u8> {
    let mut line = Vec::with_capacity(256);
    let mut serializer = Serializer::with_formatter(&mut line, AsciiFormatter);
    if let Err(error) = message.serialize(&mut serializer) {
        // Only a map with keys that are no strings can come here, and we have none.
        log::error!("control: cannot encode a message: {error}");
        line.clear();
    }
    line.extend_from_slice(b"\r\n");
    line
}

struct AsciiFormatter;

impl AsciiFormatter {
    fn separate<W: ?Sized + io::Write>(writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
}

impl Formatter for AsciiFormatter {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        Self::separate(writer, first)
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        Self::separate(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let mut units = [0; 2];
        for c in fragment.chars() {
            if c.is_ascii() && c != '\x7f' {
                writer.write_all(&[c as u8])?;
            } else {
                for unit in c.encode_utf16(&mut units) {
                    write!(writer, "\\u{unit:04X}")?;
                }
            }
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + io::Write>(&mut self, writer: &mut W, escape: CharEscape) -> io::Result<()> {
        match escape {
            CharEscape::Quote => writer.write_all(b"\\\""),
            CharEscape::ReverseSolidus => writer.write_all(b"\\\\"),
            CharEscape::Solidus => writer.write_all(b"/"),
            CharEscape::Backspace => writer.write_all(b"\\b"),
            CharEscape::FormFeed => writer.write_all(b"\\f"),
            CharEscape::LineFeed => writer.write_all(b"\\n"),
            CharEscape::CarriageReturn => writer.write_all(b"\\r"),
            CharEscape::Tab => writer.write_all(b"\\t"),
            CharEscape::AsciiControl(byte) => write!(writer, "\\u{byte:04X}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn decode(bytes: &[u8]) -> Vec<Incoming> {
        let mut incoming = Vec::new();
        Decoder::default().push(bytes, |one| incoming.push(one));
        incoming
    }

    fn message(value: Value) -> Incoming {
        Incoming::Message(value)
    }

    fn rubbish(incoming: &Incoming) -> &str {
        match incoming {
            Incoming::Rubbish(text) => text,
            Incoming::Message(value) => panic!("{value} is no rubbish"),
        }
    }

    #[test]
    fn messages_need_no_separator_and_may_span_lines() {
        assert_eq!(decode(b"{}{\"a\":\r\n [1]}"), [message(json!({})), message(json!({"a": [1]}))]);
        assert_eq!(decode(b"[1]"), [message(json!([1]))]);
        assert_eq!(decode(b"1 true\n"), [message(json!(1)), message(json!(true))]);
        assert_eq!(decode(b"\"x\""), [message(json!("x"))]);
    }

    #[test]
    fn single_quotes_are_strings_too() {
        assert_eq!(
            decode(br#"{'a': 'say "hi" it\'s', "b": "it's \" \'"}"#),
            [message(json!({"a": "say \"hi\" it's", "b": "it's \" '"}))]
        );
        assert_eq!(decode(br#"{'a\n\u0041\\': 1}"#), [message(json!({"a\nA\\": 1}))]);
    }

    #[test]
    fn rubbish_gives_one_error_and_the_next_message_is_understood() {
        for bad in [
            &b"{\"execute\": }"[..],
            b"{\"execute\" \x01",
            b"{\"execute\": \"qu\xff",
            b"{\"exec\n",
            b"\xff\xff\xff\n",
            b"%%% hello\n",
            b"]",
            b"{]",
            b"{\"a\": \"\xc3\x28\"}",
            b"{'a': \\'}'}",
        ] {
            let mut stream = bad.to_vec();
            stream.extend_from_slice(b"{\"execute\": \"x\"}");
            let incoming = decode(&stream);
            assert_eq!(incoming.len(), 2, "{bad:?}: {incoming:?}");
            assert!(rubbish(&incoming[0]).starts_with("JSON parse error, "), "{incoming:?}");
            assert_eq!(incoming[1], message(json!({"execute": "x"})));
        }
        assert_eq!(rubbish(&decode(b"{\"execute\": }")[0]), "JSON parse error, expecting value");
    }

    #[test]
    fn what_is_too_large_or_too_deep_is_dropped() {
        let mut stream = b"{\"a\": \"".to_vec();
        stream.resize(4 * MESSAGE_BYTES_MAX, b'x');
        let mut decoder = Decoder::default();
        let mut incoming = Vec::new();
        decoder.push(&stream, |one| incoming.push(one));
        assert!(decoder.text.capacity() <= 2 * MESSAGE_BYTES_MAX);
        decoder.push(b"\n{}", |one| incoming.push(one));
        assert_eq!(incoming.len(), 2);
        assert_eq!(incoming[1], message(json!({})));

        let deep = decode(&b"[".repeat(100_000));
        assert_eq!(deep.len(), 1);
    }

    #[test]
    fn output_is_one_line_of_ascii() {
        let line = encode(&json!({"a": "ä\u{1F600}\u{7f}\n\"\\", "b": [1, null]}));
        assert_eq!(
            String::from_utf8(line).unwrap(),
            "{\"a\": \"\\u00E4\\uD83D\\uDE00\\u007F\\n\\\"\\\\\", \"b\": [1, null]}\r\n"
        );
    }

    proptest! {
        #[test]
        fn no_bytes_upset_the_decoder(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes, |_| {});
            decoder.push(b"\xff\n", |_| {});
            let mut incoming = Vec::new();
            decoder.push(b"{\"a\": 1}", |one| incoming.push(one));
            prop_assert_eq!(incoming, vec![message(json!({"a": 1}))]);
        }

        #[test]
        fn what_is_encoded_decodes_to_the_same(text in any::<String>(), number in any::<i64>()) {
            let value = json!({"text": text, "list": [number, {"more": true}]});
            prop_assert_eq!(decode(&encode(&value)), vec![message(value)]);
        }
    }
}
