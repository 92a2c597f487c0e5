// asio without Boost: async_read_until, then async_write of all the whole lines that have come.
//   asio_echo <port>
#include <asio.hpp>

#include <cstdlib>
#include <memory>
#include <string>

using asio::ip::tcp;

class connection : public std::enable_shared_from_this<connection>
{
public:
    explicit connection(tcp::socket s) : socket(std::move(s)) {}

    void read()
    {
        auto self = shared_from_this();
        asio::async_read_until(socket, asio::dynamic_buffer(in, 1u << 20), '\n',
                               [self](std::error_code error, size_t) {
                                   if (!error) {
                                       self->write();
                                   }
                               });
    }

private:
    // Looks at every line, as a server has to that does something with them.
    size_t whole_lines() const
    {
        size_t whole = 0, end;
        while ((end = in.find('\n', whole)) != std::string::npos) {
            whole = end + 1;
        }
        return whole;
    }

    void write()
    {
        auto self = shared_from_this();
        size_t size = whole_lines();
        asio::async_write(socket, asio::buffer(in.data(), size), [self, size](std::error_code error, size_t) {
            if (!error) {
                self->in.erase(0, size);
                self->read();
            }
        });
    }

    tcp::socket socket;
    std::string in;
};

static void accept(tcp::acceptor &acceptor)
{
    acceptor.async_accept([&acceptor](std::error_code error, tcp::socket socket) {
        if (!error) {
            std::error_code ignored;
            socket.set_option(tcp::no_delay(true), ignored);
            std::make_shared<connection>(std::move(socket))->read();
        }
        accept(acceptor);
    });
}

int main(int argc, char **argv)
{
    asio::io_context io(1);
    unsigned short port = (unsigned short)(argc > 1 ? std::atoi(argv[1]) : 8888);
    tcp::acceptor acceptor(io, {asio::ip::address_v4::loopback(), port});
    acceptor.listen(4096);
    accept(acceptor);
    io.run();
}
