/* websocket_handshake.h - the request with which a browser opens a WebSocket, and the proof that it
 * was understood (RFC 6455, section 4), for websocket.c. SHA-1 has to protect nothing here. */

static uint32_t rotate(uint32_t word, int by)
{
    return word << by | word >> (32 - by);
}

static void sha1_block(uint32_t sum[5], const unsigned char *block)
{
    uint32_t a = sum[0], b = sum[1], c = sum[2], d = sum[3], e = sum[4], w[80], f, k, next;
    int i;
    for (i = 0; i < 80; i++) {
        const unsigned char *at = block + 4 * (i & 15);
        w[i] = i < 16 ? (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3]
                      : rotate(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
        f = i < 20 ? (b & c) | (~b & d) : i < 40 || i >= 60 ? b ^ c ^ d : (b & c) | (d & (b | c));
        k = i < 20 ? 0x5a827999 : i < 40 ? 0x6ed9eba1 : i < 60 ? 0x8f1bbcdc : 0xca62c1d6;
        next = rotate(a, 5) + f + e + k + w[i];
        e = d, d = c, c = rotate(b, 30), b = a, a = next;
    }
    sum[0] += a, sum[1] += b, sum[2] += c, sum[3] += d, sum[4] += e;
}

static void base64(char *text, const unsigned char *bytes, size_t size)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < size; i += 3, text += 4) {
        unsigned one = bytes[i], two = i + 1 < size ? bytes[i + 1] : 0,
                 three = i + 2 < size ? bytes[i + 2] : 0;
        text[0] = digits[one >> 2];
        text[1] = digits[(one & 3) << 4 | two >> 4];
        text[2] = (char)(i + 1 < size ? digits[(two & 15) << 2 | three >> 6] : '=');
        text[3] = (char)(i + 2 < size ? digits[three & 63] : '=');
    }
    *text = 0;
}

/* What proves it: the SHA-1, which takes two blocks of 64, of the key's 24 and 36 more bytes. */
static void prove(const char *key, char proof[29])
{
    uint32_t sum[5] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0};
    unsigned char blocks[128] = {0}, digest[20];
    memcpy(blocks, key, 24);
    memcpy(blocks + 24, "258EAFA5-E914-47DA-95CA-C5AB0DC85B11", 36);
    blocks[60] = 0x80;
    blocks[126] = 60 * 8 >> 8; /* bits */
    blocks[127] = 60 * 8 & 255;
    sha1_block(sum, blocks);
    sha1_block(sum, blocks + 64);
    for (int i = 0; i < 20; i++) {
        digest[i] = (unsigned char)(sum[i / 4] >> (24 - 8 * (i % 4)));
    }
    base64(proof, digest, sizeof(digest));
}

/* The value of a field, up to its '\r'; "\r" = there is none, or more than one. */
static const char *field(const tsrv_slice *head, const char *name)
{
    const char *line = head->data, *found = "\r";
    size_t size = strlen(name), count = 0;
    while (*(line = strstr(line, "\r\n") + 2) != '\r') {
        if (strncasecmp(line, name, size) == 0 && line[size] == ':') {
            found = line + size + 1 + strspn(line + size + 1, " \t");
            count++;
        }
    }
    return count == 1 ? found : "\r";
}

/* A list may come in parts, each with a field of its own. */
static bool lists(const tsrv_slice *head, const char *name, const char *word)
{
    const char *line = head->data;
    size_t size = strlen(name);
    bool found = false;
    while (!found && *(line = strstr(line, "\r\n") + 2) != '\r') {
        found = strncasecmp(line, name, size) == 0 && line[size] == ':' &&
                has_word(line + size + 1, word);
    }
    return found;
}

/* A browser tells whose page it is that asks. Those of others may not, with this one's cookies. */
static bool is_own_page(const char *origin, const char *host)
{
    const char *at = origin + strcspn(origin, ":\r");
    size_t size = strcspn(host, " \t\r");
    return *origin == '\r' || (strncmp(at, "://", 3) == 0 && strncasecmp(at + 3, host, size) == 0 &&
                               strchr(" \t\r", at[3 + size]) != NULL && size > 0);
}

/* Of a request that has been parsed. Returns NULL and the proof, or the status of a refusal. */
static const char *open_socket(const tsrv_slice *head, const request *r, char proof[29])
{
    const char *key = field(head, "Sec-WebSocket-Key");
    size_t size = strspn(key, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/");
    if (!r->keep /* or it has a body */ || *field(head, "Host") == '\r' ||
        !lists(head, "Upgrade", "websocket") || !lists(head, "Connection", "Upgrade") ||
        size != 22 || strncmp(key + size, "==", 2) != 0 || strchr(" \t\r", key[24]) == NULL) {
        return "400 Bad Request";
    } else if (!lists(head, "Sec-WebSocket-Version", "13")) {
        return "426 Upgrade Required\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13";
    } else if (!is_own_page(field(head, "Origin"), field(head, "Host"))) {
        return "403 Forbidden";
    }
    prove(key, proof);
    return NULL;
}
